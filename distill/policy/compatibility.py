"""Checks that a teacher and a student share a vocabulary and stop tokens."""

from distill.data import chat
from distill.policy.policy import Policy
from models.errors import UserError


def require_same_vocabulary(student: Policy, teacher: Policy) -> None:
    """Raises UserError if a token id stands for different tokens in the two models."""
    names = (student.path, teacher.path)
    try:
        chat.require_same_tokenizer(student.tokenizer, teacher.tokenizer, names)
    except UserError as error:
        try:
            chat.require_vocab_subset(student.tokenizer, teacher.tokenizer, names)
        except UserError:
            raise error from None
        remedy = f"--config.student.tokenizer={teacher.path} gives it the teacher's"
        raise UserError(f"{error}; {remedy}") from None
    if student.config.vocab_size != teacher.config.vocab_size:
        raise UserError(
            f"{teacher.path}: vocab_size={teacher.config.vocab_size}, "
            f"but {student.path} has {student.config.vocab_size}"
        )


def find_extra_stop_ids(student: Policy, teacher: Policy) -> list[int]:
    """Returns the stop ids of the teacher that do not stop the student."""
    return sorted(set(teacher.stop_ids) - set(student.stop_ids))
