"""What the demo asks: prompts of several kinds, none with a block in common with another."""

from dataclasses import dataclass

from kvconnect.cli.client import CompletionRequest

_THINGS = ["lantern", "ledger", "kettle", "violin", "compass", "blanket", "mirror", "hammer"]
_COLOURS = ["copper", "green", "striped", "grey", "painted", "silver", "crooked"]
_OWNERS = ["Nadia", "Tomas", "Imre", "Chloe", "Bashir", "Yuki", "Greta", "Omar", "Lucia"]
_TOWNS = ["Lisbon", "Tromso", "Kyoto", "Quito", "Dakar", "Riga", "Perth", "Izmir"]


@dataclass(frozen=True)
class Scene:
    """Prompts that are asked at once, and whether the prefill engine is dead by then."""

    name: str
    prompts: list[CompletionRequest]
    alone: bool = False


def inventory(title: str, records: int, start: int) -> str:
    """A list of records, and a question about one of them: some 17 tokens a record."""
    lines = [f"Inventory of the house in {title}."]
    for i in range(start, start + records):
        thing, colour = _THINGS[i % 8], _COLOURS[i % 7]
        lines.append(f"Room {i}: the {colour} {thing} belongs to {_OWNERS[i % 9]}.")
    wanted = start + records // 3
    lines.append(f"Question: who owns the thing in room {wanted}? Answer: room {wanted}: the")
    return "\n".join(lines)


def scenes() -> list[Scene]:
    """In the order in which they are played; those without a prefill engine are the last."""
    long = CompletionRequest(inventory("Porto", 128, 100), 24)
    eight = [
        CompletionRequest(inventory(town, 8 + 4 * n, 100 * n), 16) for n, town in enumerate(_TOWNS)
    ]
    chat = CompletionRequest("Tell me in two sentences why the sky is blue.", 40, chat=True)
    return [
        Scene("short prompt", [CompletionRequest("The capital of France is", 16)]),
        Scene("long prompt", [long]),
        Scene("chat, streamed", [chat]),
        Scene("8 at once", eight),
        Scene("a new prompt", [CompletionRequest(inventory("Oslo", 20, 900), 24)], alone=True),
        Scene("the long one again", [long], alone=True),
    ]
