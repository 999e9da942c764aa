"""The prompts of a stage by step, rendered one step ahead in a thread."""

import functools

import jax

from distill import rollout
from distill.data import dataset
from distill.training import response_limits
from distill.training.setup import StageSetup


class StagePrompts:
    """Prompts by number.

    Numbers of the stage's steps give their prompts. Later numbers give prompts that belong to no
    step, for further rounds of steps with groups without variance.
    """

    def __init__(self, stage: StageSetup, seed: int) -> None:
        self._stage, self._seed = stage, seed
        # Partial and asynchronous rollouts request a number more than once.
        load_cached = functools.lru_cache(maxsize=4)(self._load_examples)
        self.get_examples = dataset.prefetch_next(load_cached, stage.end_step)

    def _load_examples(self, number: int) -> list[dataset.Example]:
        """Returns the sampled part of a step's examples. In further rounds, examples have the same
        difficulty as those of the step."""
        stage, s, step = self._stage, self._stage.c, number
        if number >= stage.end_step:
            step = (number - stage.end_step) // s.reward.max_rounds
        count = stage.sampled_rows // s.samples
        num_examples = s.batch_size if stage.sampled_rows < s.batch_size else count
        examples = dataset.get_step_examples(
            stage.source,
            number - stage.first_step,
            num_examples,
            self._seed,
            curriculum_step=step - stage.first_step,
        )
        return examples[:count]

    def expand_prompts(self, number: int, step: int) -> list[rollout.Sequence]:
        """Returns unstarted sequences, the samples of a number's prompts, to begin in `step`."""
        s, key = self._stage.c, jax.random.fold_in(jax.random.key(self._seed), number)
        limit = response_limits.get_response_limit(s, step - self._stage.first_step)
        return rollout.expand_prompts(self.get_examples(number), s.samples, key, limit)

    def get_requests(self, step: int, buffer: rollout.RolloutBuffer) -> list[rollout.Sequence]:
        """Returns the sequences that a step samples. With a token budget these are the partial
        rollouts, followed by new sequences that fill up the step."""
        if not self._stage.token_budget:
            return self.expand_prompts(step, step)
        size, num_started = self._stage.sampled_rows, buffer.num_started
        num_new = size - len(buffer.partial)
        sequences: list[rollout.Sequence] = []
        for index in range(num_started // size, -(-(num_started + num_new) // size)):
            sequences += self.expand_prompts(self._stage.first_step + index, step)
        # Copies, so that the buffer of a step that is left off is that of the step's start.
        return [x.copy() for x in buffer.partial] + sequences[num_started % size :][:num_new]
