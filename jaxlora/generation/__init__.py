"""F4: text from a model: sampling, batched and streamed decoding, scoring and a chat loop."""

from jaxlora.generation.chat import Session, chat
from jaxlora.generation.decoding import generate, stream
from jaxlora.generation.sampling import SamplingOptions
from jaxlora.generation.scoring import Score, exact_match
from jaxlora.generation.text import answer_text, end_ids, pieces

__all__ = [
    "SamplingOptions",
    "Score",
    "Session",
    "answer_text",
    "chat",
    "end_ids",
    "exact_match",
    "generate",
    "pieces",
    "stream",
]
