"""What a kind of data brings to a stage: clips with captions (`retrieval`), images with `questions`."""

from clipdistill_jax.systems.questions import QUESTIONS, QuestionSystem
from clipdistill_jax.systems.retrieval import RetrievalSystem
from clipdistill_jax.systems.system import Config, System, Vocab


def make_system(config: Config, vocab: Vocab | None = None) -> System:
    """The system that a config's data format belongs to; `vocab` as in `System`."""
    if config["data"]["format"] in QUESTIONS:
        return QuestionSystem(config, vocab)
    return RetrievalSystem(config, vocab)
