"""A workflow that sleeps and goes on by itself: the onboarding of a new user.

    python examples/functional/simple_example.py

While it sleeps the run holds nothing: no thread, no memory that matters, no connection. It wakes
up wherever a worker is, in this process or in another one, an hour or a year later.
"""

from datetime import timedelta

from pyworkflow import get_events, get_run, result, sleep, start, step, workflow

PAUSE = timedelta(seconds=1)  # in earnest: "1d"


@step()
async def send_welcome_email(user_id: str) -> str:
    print(f"  welcome, {user_id}")
    return f"welcome mail to {user_id}"


@step()
async def send_tips_email(user_id: str) -> str:
    print(f"  some tips for {user_id}")
    return f"tips to {user_id}"


@workflow()
async def onboarding(user_id: str) -> list[str]:
    welcome = await send_welcome_email(user_id)
    await sleep(PAUSE)
    tips = await send_tips_email(user_id)
    return [welcome, tips]


if __name__ == "__main__":
    run_id = start(onboarding, user_id="user_123")
    print(f"run {run_id}")
    print(f"result: {result(run_id, timeout='30s')}")
    print(f"status: {get_run(run_id).status}")
    print("history:")
    for event in get_events(run_id):
        print(f"  {event.seq:2}  {event.type}")
