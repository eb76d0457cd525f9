"""What one request may ask for, and how long it may take."""

from typing import NamedTuple


class Limits(NamedTuple):
    """Bounds of requests; `sizes` are (height, width), the first is the default."""

    sizes: tuple[tuple[int, int], ...]
    n: int = 10
    steps: int = 100
    prompt_bytes: int = 4096
    body_bytes: int = 2**25  # of a request
    all_bodies: int = 2**28  # of all requests that are being read
    pixels: int = 2**24  # of an uploaded picture
    queue: int = 256  # pictures that wait
    # Longer waits fill batches better and delay a lone request by as much.
    wait_s: float = 0.02  # for other pictures of its batch
    request_s: float = 300.0  # from arrival to answer
    read_s: float = 30.0  # for a request to arrive
    partial_images: int = 0
    kept: int = 64  # pictures that can be fetched by URL


def size_text(size: tuple[int, int]) -> str:
    """(height, width) as OpenAI writes it, WIDTHxHEIGHT."""
    return f"{size[1]}x{size[0]}"
