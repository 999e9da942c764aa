"""A stage's prompts, step by step, rendered a step ahead in a thread."""

import functools

import jax

from distill import rollout
from distill.data import dataset
from distill.training.setup import Stage


class Prompts:
    """Prompts are numbered by steps: those of a step of the stage, and from its end on those that
    no step asks, for further rounds of a step whose rewards were all equal."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self._stage, self._seed = stage, seed
        # Asked for again by rows that were parked, or sampled ahead.
        made = functools.lru_cache(maxsize=4)(self._make)
        self.examples = dataset.ahead(made, stage.end)

    def _make(self, number: int) -> list[dataset.Example]:
        """The first of what a step reads; further ones are as difficult as the step's own."""
        stage = self._stage
        s, rounds, step = stage.c, stage.c.reward.rounds, number
        if number >= stage.end:
            step = (number - stage.end) // rounds
        count = stage.sampled // s.samples
        whole = s.batch_size if stage.sampled < s.batch_size else count
        first = stage.first
        found = dataset.at(stage.source, number - first, whole, self._seed, now=step - first)
        return found[:count]

    def expand(self, number: int) -> list[rollout.Sequence]:
        """The samples of a step's prompts, not begun."""
        s, key = self._stage.c, jax.random.fold_in(jax.random.key(self._seed), number)
        return rollout.expand_prompts(self.examples(number), s.samples, key, s.max_response_tokens)

    def of_step(self, step: int) -> list[rollout.Sequence]:
        """What a step samples: what was parked, and then as many new ones as there is room."""
        stage, size, parked = self._stage, self._stage.sampled, self._stage.parked
        if not parked:
            return self.expand(step)
        begun, count = parked.begun, size - len(parked.rows)
        rows: list[rollout.Sequence] = []
        for index in range(begun // size, -(-(begun + count) // size)):
            rows += self.expand(stage.first + index)
        return parked.rows + rows[begun % size :][:count]
