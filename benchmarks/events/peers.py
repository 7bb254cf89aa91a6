"""aiokafka by hand, FastStream and confluent-kafka. Runs in the peers' environment."""

import asyncio
import logging
import time
import uuid

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from confluent_kafka import Consumer, Producer
from faststream.kafka import KafkaBroker

from benchmarks.events.load import HEADERS, Fields, orders, per_second, values
from benchmarks.peer import serve

logging.disable(logging.CRITICAL)


def _producer(servers: str) -> AIOKafkaProducer:
    return AIOKafkaProducer(
        bootstrap_servers=servers,
        acks="all",
        enable_idempotence=True,
        linger_ms=5,
        max_batch_size=262_144,
        compression_type="lz4",
    )


async def publish_many(servers: str, topic: str, count: int) -> float:
    """`send` after `send`, the confirmations awaited together."""
    load = values(count)
    async with _producer(servers) as producer:
        await producer.send_and_wait(topic, b"warm")

        async def work() -> None:
            sent = [await producer.send(topic, value, key=key, headers=HEADERS) for key, value in load]
            await asyncio.gather(*sent)

        return await per_second(count, work)


async def publish_each(servers: str, topic: str, count: int) -> float:
    """`send_and_wait` by 200 tasks."""
    load = iter(values(count))
    async with _producer(servers) as producer:
        await producer.send_and_wait(topic, b"warm")

        async def one() -> None:
            for key, value in load:
                await producer.send_and_wait(topic, value, key=key, headers=HEADERS)

        async def work() -> None:
            await asyncio.gather(*(one() for _ in range(200)))

        return await per_second(count, work)


async def faststream_publish_each(servers: str, topic: str, count: int) -> float:
    """FastStream's `publish` by 200 tasks."""
    load = iter(orders(count))
    broker = KafkaBroker(servers, logger=None, acks="all", enable_idempotence=True, linger_ms=5, compression_type="lz4")
    await broker.connect()
    headers = {name: value.decode() for name, value in HEADERS}

    async def one() -> None:
        for order in load:
            await broker.publish(order, topic, key=str(order.order).encode(), headers=headers)

    async def work() -> None:
        await asyncio.gather(*(one() for _ in range(200)))

    try:
        return await per_second(count, work)
    finally:
        await broker.stop()


def confluent_publish_many(servers: str, topic: str, count: int) -> float:
    """Produce after produce, then flush; the client is C."""
    load = values(count)
    producer = Producer(
        {
            "bootstrap.servers": servers,
            "enable.idempotence": True,
            "linger.ms": 5,
            "compression.type": "lz4",
            "queue.buffering.max.messages": 1_000_000,
        }
    )
    headers: list[tuple[str, str | bytes | None]] = [*HEADERS]
    producer.produce(topic, b"warm")
    producer.flush()
    started = time.perf_counter()
    for key, value in load:
        producer.produce(topic, value, key=key, headers=headers)
    assert producer.flush() == 0
    return count / (time.perf_counter() - started)


async def _call(_event: Fields) -> None:
    pass


async def consume(servers: str, topic: str, count: int) -> float:
    """Aiokafka's getmany, validation and a call; one commit at the end. No order by key, no retry, no dead letters."""
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=servers,
        group_id=uuid.uuid4().hex,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
    )
    validate = Fields.__pydantic_validator__.validate_json
    done, started = 0, 0.0
    async with consumer:
        while done < count:
            fetched = await consumer.getmany(timeout_ms=500)
            started = started or (time.perf_counter() if fetched else 0.0)
            for records in fetched.values():
                for record in records:
                    await _call(validate(record.value))
                done += len(records)
        await consumer.commit()
        return done / (time.perf_counter() - started)


async def faststream_consume(servers: str, topic: str, count: int) -> float:
    """A FastStream subscriber with a typed event."""
    broker = KafkaBroker(servers, logger=None)
    finished = asyncio.Event()
    done, started = 0, 0.0

    @broker.subscriber(topic, group_id=uuid.uuid4().hex, auto_offset_reset="earliest")
    async def handle(event: Fields) -> None:  # noqa: ARG001  its type is what is decoded
        nonlocal done, started
        started = started or time.perf_counter()
        done += 1
        if done >= count:
            finished.set()

    await broker.start()
    try:
        await asyncio.wait_for(finished.wait(), 120)
        return done / (time.perf_counter() - started)
    finally:
        await broker.stop()


def confluent_consume(servers: str, topic: str, count: int) -> float:
    """confluent-kafka with validation and a call."""
    consumer = Consumer(
        {
            "bootstrap.servers": servers,
            "group.id": uuid.uuid4().hex,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
        }
    )
    consumer.subscribe([topic])
    validate = Fields.__pydantic_validator__.validate_json
    done, started = 0, 0.0
    while done < count:
        records = consumer.consume(500, 0.5)
        started = started or (time.perf_counter() if records else 0.0)
        for record in records:
            validate(record.value() or b"")
        done += len(records)
    figure = done / (time.perf_counter() - started)
    consumer.close()
    return figure


if __name__ == "__main__":
    serve(
        {
            "publish_many": publish_many,
            "publish_each": publish_each,
            "faststream_publish_each": faststream_publish_each,
            "confluent_publish_many": confluent_publish_many,
            "consume": consume,
            "faststream_consume": faststream_consume,
            "confluent_consume": confluent_consume,
        }
    )
