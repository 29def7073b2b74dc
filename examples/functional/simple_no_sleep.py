"""The smallest useful workflow: three steps, one after the other, no waiting.

    python examples/functional/simple_no_sleep.py

Each step's result is recorded before the next step begins. Were the process killed in between,
`pyworkflow worker examples/functional/simple_no_sleep.py` would go on behind the last recorded
step and run none of them again.
"""

from pyworkflow import result, start, step, workflow


@step()
async def price_in_stock(item: str, quantity: int) -> float:
    print(f"  checking the stock of {item}")
    return 12.5 * quantity


@step()
def charge_card(amount: float) -> str:
    # An ordinary function works too: it runs in a thread.
    print(f"  charging {amount:.2f}")
    return f"payment-{amount:.0f}"


@step()
async def ship(item: str, payment: str) -> str:
    print(f"  shipping {item}, paid by {payment}")
    return f"parcel with {item}"


@workflow()
async def buy(item: str, quantity: int) -> dict[str, str]:
    price = await price_in_stock(item, quantity)
    payment = await charge_card(price)
    parcel = await ship(item, payment)
    return {"payment": payment, "parcel": parcel}


if __name__ == "__main__":
    run_id = start(buy, item="teapot", quantity=2)
    print(f"run {run_id}")
    print(f"result: {result(run_id, timeout='30s')}")
