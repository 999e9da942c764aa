r"""Tests where the final answer of a response is found."""

import time

import pytest

from distill.rewards import graders
from distill.rewards.answers import extract_answer, extract_boxed

# A response, and the answer that is equal to what is found in it.
MARKED = [
    *(("The answer is negative 2.", "-2"), ("Answer: |-5|", "5"), ("Answer: 10⁻³", "0.001")),
    ("The answer is (-∞, 2) ∪ (3, ∞).", "(-\\infty,2)\\cup(3,\\infty)"),
    *(("Answer: 3:00 PM", "3:00 PM"), ("| Answer | **18** |", "18")),
    ("**Final Answer**\n\n18", "18"),
    ("**Final Answer**\n\\[18\\]", "18"),
    ("### Answer\n18", "18"),
    ("### Final Answer\n\n$$\n18\n$$", "18"),
    ("Answer:**18**", "18"),
    ("**Answer**: 18", "18"),
    ("**Answer: 18**", "18"),
    ("- **Answer:** 18 hens", "18"),
    ("| Answer: | 18 |", "18"),
    ("Answer:\n\n- 18", "18"),
    ("Answer: `18`", "18"),
    ("<answer>18</answer>", "18"),
    ("ANSWER: 18", "18"),
    ("A: 18", "18"),
    ("Answer – 18", "18"),
    ("The answer is\n18", "18"),
    ("The answer is:\n\n18", "18"),
    ("The answer is: \n**18 hens**", "18"),
    ("The answer to the first question is 18.", "18"),
    ("Therefore, the answer would be 18.", "18"),
    ("So the answer = 18.", "18"),
    ("Final Answer: The final answer is $18$. I hope it is correct.", "18"),
    ("The answer is 18!", "18"),
    # an expression, not a number of it
    ("The answer is **$\\frac{3}{4}$**", "\\frac34"),
    ("the answer is $x=\\frac{1}{2}$", "\\frac12"),
    ("The final answer is $2\\sqrt{3}$.", "2\\sqrt3"),
    ("The final answer is:\n\\[\n2\\sqrt{3}\n\\]", "2\\sqrt3"),
    ("answer is (−3, 4)", "(-3,4)"),
    ("The answer is [0, 1).", "[0,1)"),
    ("The answer is $\\{1, 2, 3\\}$.", "\\{1,2,3\\}"),
    ("The answer is 5/8 of the pie", "\\frac58"),
    ("The answer is 3 1/2 cups.", "\\frac72"),
    ("The answer is 2x + 3.", "2x+3"),
    ("The answer is n(n+1)/2.", "\\frac{n(n+1)}{2}"),
    ("The answer is x^2 - 1 (for x > 0).", "x^2-1"),
    ("The answer is √3/2.", "\\frac{\\sqrt3}{2}"),
    ("The answer is sqrt(3)/2.", "\\frac{\\sqrt3}{2}"),
    ("The answer is 1.5 × 10^3.", "1500"),
    ("The answer is 5 < x < 7.", "5<x<7"),
    ("Answer: sin(x)", "\\sin x"),
    ("Answer: x + xy", "x+xy"),
    ("Answer: |x| < 3", "|x|<3"),
    ("Answer: \\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ("The answer is 50%.", "50\\%"),
    ("The answer is 50 percent.", "50\\%"),
    ("The answer is x = 1 or x = 2.", "1,2"),
    ("The answer is $1$ and $2$.", "1,2"),
    ("The answer is 1, 2 and 3.", "1,2,3"),
    # numbers
    ("Answer: 1,234,567.89", "1234567.89"),
    ("Answer: 1\u202f000\u202f000", "1000000"),
    ("The answer is $1,000.", "1000"),
    ("The answer is $5 and not $6.", "5"),
    ("The answer is -$4.50", "-4.5"),
    ("The answer is −3.", "-3"),
    ("The answer is – 3.", "-3"),
    ("The answer is −$\\frac{1}{2}$", "-\\frac12"),
    ("The answer is 60°.", "60"),
    ("The answer is $5\\text{ cm}^2$.", "5"),
    ("The answer is 18 and I checked it 3 times.", "18"),
    ("The answer is that she has 18 hens, not 6.", "18"),
    # not what stands in a bracket behind it
    ("Answer: 18 (2 dozen minus 6)", "18"),
    ("The answer is approximately 3.5 (that is 7/2)", "3.5"),
    ("#### $42 for 7 days", "42"),
    # words and letters
    ("The answer is east.", "\\text{east}"),
    ("Answer: **Yes**", "yes"),
    ("The answer is Tom Smith.", "\\text{Tom Smith}"),
    ("Answer: (C)", "C"),
    ("The answer is C.", "\\text{(C)}"),
    ("The answer is (B) 18", "B"),
    ("The answer is B: 18 hens", "B"),
    ("Answer: Option C", "C"),
    ("The correct option is (B).", "B"),
    # a later sentence about the answer
    ("Answer: 18\n\nLet me verify: 3*6=18. So the answer is correct.", "18"),
    ("Answer: 18\n\nI hope this answer is helpful to all 7 of you", "18"),
]

UNMARKED = [
    ("So the total is 3/4.", "\\frac34"),
    ("So $x = \\frac{3}{4}$.", "\\frac34"),
    ("Hence the area is $2\\sqrt{3}$ (about 3.46).", "2\\sqrt3"),
    ("\\[\n\\frac{70{,}000}{7} = 10{,}000\n\\]", "10000"),
    ("6 * 7 = 42", "42"),
    ("She makes 9 * 2 = $18 per day.", "18"),
    ("It is 18 (3 times 6)", "18"),
    ("It falls to −3", "-3"),
    ("We get 2^{10}.", "1024"),
    ("#### 2. Add\n 5 + 3 = 8", "8"),
    ("(C)", "\\text{C}"),
    *(("**C**", "C"), ("**(C)**", "C"), ("**C.**", "C")),
    ("| Step | Value |\n|---|---|\n| eggs | 16 |\n| **Total** | **18** |", "18"),
    ("| Step | Value |\n|---|---|\n| 9 * 2 | 18 |", "18"),
    *(("So |-5| = 5", "5"), ("It is |-5|", "5"), ("So P(A|B) = 1/2", "1/2")),
    *(("(x+1)^2", "x^2+2x+1"), ("It is 1.5 × 10⁶", "1500000"), ("It is minus $6", "-6")),
    ("The time is 3:00 AM", "3:00 a.m."),
]

BOXED = [
    ("$\\boxed 5$.", "5"),
    ("\\boxed\\frac{1}{2}", "\\frac12"),
    ("\\fbox{5}", "5"),
    ("\\boxed {5}", "5"),
    ("\\\\boxed{5}", "5"),
    ("\\boxed{\\boxed{5}}", "5"),
    ("\\boxed{\\text{A}}", "A"),
    ("So \\boxed{5}. As asked, the answer is within \\boxed{}.", "5"),
    # one brace of a pair that is escaped
    ("\\boxed{\\left\\{ 5 \\right.}", "5"),
    ("\\boxed{x \\in \\{1, 2\\}} and \\{", "\\{1,2\\}"),
    (
        "$\\boxed{\\left\\{\\begin{array}{cl} x & x>0 \\\\ 0 & x\\le0 \\end{array}\\right.}$",
        "\\left\\{\\begin{array}{cl} x & x > 0 \\\\ 0 & x \\le 0 \\end{array}\\right.",
    ),
    ("\\boxed{\\begin{cases} 1 \\\\{2} \\end{cases}}", "\\begin{cases} 1 \\\\{2} \\end{cases}"),
    # boxes that are one answer
    ("The roots are $\\boxed{1}$ and $\\boxed{2}$.", "1,2"),
    ("\\boxed{1}, \\boxed{2}, and \\boxed{3}", "1,2,3"),
    ("$x = \\boxed{1}$ and $y = \\boxed{2}$", "(1,2)"),
    ("One root is \\boxed{1} and the other is \\boxed{2}.", "1,2"),
    ("\\boxed{1} \\text{ or } \\boxed{2}", "1,2"),
    # boxes that are not
    ("\\boxed{3}. So \\boxed{7}.", "7"),
    ("\\boxed{3}, no: \\boxed{7}", "7"),
    ("\\boxed{3} and therefore \\boxed{7}", "7"),
    ("\\boxed{3} \\boxed{7}", "7"),
    ("\\boxed{7}, that is, \\boxed{7}", "7"),
    ("\\boxed{3} and, " + "as we saw, " * 9 + "\\boxed{7}", "7"),
]


@pytest.mark.parametrize(("response", "answer"), MARKED + UNMARKED + BOXED)
def test_the_final_answer_is_found(response: str, answer: str) -> None:
    assert graders.grade_math(response, answer) == "correct"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("**Answer:** 18 hens (2 dozen minus 6)", "6"),
        ("The answer is −3.", "3"),
        ("It falls to −3", "3"),
        ("So $x = \\frac{3}{4}$.", "4"),
        ("The final answer is $2\\sqrt{3}$.", "2"),
        ("The final answer is $2\\sqrt{3}$.", "3"),
        ("answer is (−3, 4)", "4"),
        ("The roots are $\\boxed{1}$ and $\\boxed{2}$.", "2"),
        ("The answer is 18 (3 times 6)", "6"),
        ("Answer: BCA", "ABC"),
    ],
)
def test_a_part_of_the_answer_is_wrong(response: str, answer: str) -> None:
    assert graders.grade_math(response, answer) == "wrong"


@pytest.mark.parametrize(
    "response",
    [
        "",
        "I do not know",
        "The answer is",
        "The answer is unclear",
        "answer:",
        "\\boxed{6}, \\boxed{5",
    ],
)
def test_no_answer_is_found(response: str) -> None:
    assert extract_answer(response) is None
    assert graders.grade_math(response, "5") == "no_answer"


def test_the_box_of_a_solution_is_read_as_that_of_a_response() -> None:
    assert extract_boxed("so $\\boxed{1}$ or $\\boxed{2}$") == "1, 2"
    assert extract_boxed("\\boxed{\\left\\{ 5 \\right.}") == "\\left\\{ 5 \\right."
    assert extract_boxed("the answer is 5") is None


@pytest.mark.parametrize(
    "unit",
    [
        *(
            "\\",
            "\\boxed{",
            "\\boxed ",
            "\\boxed{5} and ",
            "\\text{",
            "\\[",
            "\\( x ",
            "{",
            "}",
            "$",
        ),
        *("answer ", "answer is ", "answer: ", "the answer is $ ( \\[ ", "A:\n", "#", "####\n"),
        *("1", "1,", "1.", "1 (", "1=1=", "-", "+-(", "(", " (a", "*\n", "\n", " ", ">", "\ud800"),
        *("$a ", "a ", "|", "**"),
    ],
)
def test_time_is_linear_in_the_text(unit: str) -> None:
    text = unit * (100_000 // len(unit))
    for hostile in (text, f"|{text}"):  # the second one looks like a table's row
        start = time.process_time()
        extract_answer(hostile)
        extract_boxed(hostile)
        assert time.process_time() - start < 2
