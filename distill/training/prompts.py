"""A stage's prompts, step by step, rendered a step ahead in a thread."""

import functools

import jax

from distill import rollout
from distill.data import dataset
from distill.training.setup import StageSetup


class StagePrompts:
    """Prompts are numbered by steps: those of a step of the stage, and from its end on those that
    no step asks, for further rounds of a step whose rewards were all equal."""

    def __init__(self, stage: StageSetup, seed: int) -> None:
        self._stage, self._seed = stage, seed
        # Asked for again by rows that were parked, or sampled ahead.
        load_cached = functools.lru_cache(maxsize=4)(self._load_examples)
        self.get_examples = dataset.prefetch_next(load_cached, stage.end_step)

    def _load_examples(self, number: int) -> list[dataset.Example]:
        """The first of what a step reads; further ones are as difficult as the step's own."""
        stage = self._stage
        s, rounds, step = stage.c, stage.c.reward.max_rounds, number
        if number >= stage.end_step:
            step = (number - stage.end_step) // rounds
        count = stage.sampled_rows // s.samples
        num_prompts = s.batch_size if stage.sampled_rows < s.batch_size else count
        first = stage.first_step
        examples = dataset.get_step_examples(
            stage.source, number - first, num_prompts, self._seed, curriculum_step=step - first
        )
        return examples[:count]

    def expand_prompts(self, number: int) -> list[rollout.Sequence]:
        """The samples of a step's prompts, not begun."""
        s, key = self._stage.c, jax.random.fold_in(jax.random.key(self._seed), number)
        return rollout.expand_prompts(
            self.get_examples(number), s.samples, key, s.max_response_tokens
        )

    def get_sequences(self, step: int) -> list[rollout.Sequence]:
        """What a step samples: what was parked, and then as many new ones as there is room."""
        stage, size, partial_rollouts = (
            self._stage,
            self._stage.sampled_rows,
            self._stage.partial_rollouts,
        )
        if not partial_rollouts:
            return self.expand_prompts(step)
        num_started, count = partial_rollouts.num_started, size - len(partial_rollouts.sequences)
        rows: list[rollout.Sequence] = []
        for index in range(num_started // size, -(-(num_started + count) // size)):
            rows += self.expand_prompts(stage.first_step + index)
        return partial_rollouts.sequences + rows[num_started % size :][:count]
