"""Retries, errors and sleep in one workflow: an order from payment to delivery.

    python examples/functional/basic_workflow.py

Shows the three ways a step may fail (tried again, fatal, out of tries), compensation with plain
try/except, an idempotency key, and what an ended run says about itself.
"""

from pyworkflow import (
    FatalError,
    RetryableError,
    configure_logging,
    get_run,
    logger,
    result,
    sleep,
    start,
    step,
    step_context,
    workflow,
)


@step()
async def reserve_goods(order_id: str) -> str:
    return f"reservation of {order_id}"


@step()
async def release_goods(reservation: str) -> None:
    logger.info("giving back: %s", reservation)


@step(max_retries=3, retry_delay="exponential")
async def take_payment(order_id: str, amount: float) -> str:
    if amount <= 0:
        # No second try makes this right.
        raise FatalError(f"nothing to pay for {order_id}: amount={amount}")
    attempt = step_context().attempt
    if attempt == 1:
        # The service says when it wants to be asked again; that beats retry_delay.
        raise RetryableError("the payment service is busy", retry_after="300ms")
    logger.info("paid on try %d", attempt)
    # The same for every try, so that a service that takes a key charges once.
    return f"paid {amount:.2f} as {step_context().idempotency_key.partition('/')[2]}"


@step(max_retries=1, retry_delay="100ms")
async def print_label(order_id: str) -> str:
    raise ConnectionError(f"the printer is off: no label for {order_id}")


@workflow(max_duration="1h")
async def deliver_order(order_id: str, amount: float) -> dict[str, object]:
    reservation = await reserve_goods(order_id)
    try:
        payment = await take_payment(order_id, amount)
    except FatalError as error:
        await release_goods(reservation)
        return {"order": order_id, "status": "refused", "why": str(error)}
    try:
        label = await print_label(order_id)
    except ConnectionError:  # after its last try, with the type that it was raised with
        label = "written by hand"
    await sleep("1s")  # until the parcel service comes
    return {"order": order_id, "status": "delivered", "payment": payment, "label": label}


if __name__ == "__main__":
    configure_logging(level="INFO")
    good = start(deliver_order, "ORD-1", 25.0)
    bad = start(deliver_order, "ORD-2", 0.0)
    print(f"result: {result(good, timeout='30s')}")
    print(f"result: {result(bad, timeout='30s')}")

    # The same key is the same run, however often and from wherever it is started.
    key = f"order-ORD-3-of-{good}"
    first = start(deliver_order, "ORD-3", 9.0, idempotency_key=key)
    again = start(deliver_order, "ORD-3", 9.0, idempotency_key=key)
    assert first == again
    print(f"result: {result(first, timeout='30s')}")
    run = get_run(first)
    print(f"run {run.run_id} {run.status}, {run.history_length} events")
