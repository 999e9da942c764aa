"""Why claims came out as they did, and what more computing would settle.

Each reading names the verdict that it was written for. If the results come to give another one, the
page says that the reading is out of date.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """A reading of a claim's result.

    Args:
      verdict: that it explains, as the page words it, up to a colon.
      settle: what more computing would settle.
    """

    verdict: str
    why: str
    settle: str


READINGS: dict[tuple[str, str], Reading] = {
    ("a", "steps to equal accuracy"): Reading(
        "not reproduced",
        "GRPO rises slowly, from 36% to 43% in 150 steps. Distillation does not rise in the first "
        "15 steps, and passes GRPO's best after 36 to 41. A step of GRPO has 128 responses here, "
        "and one of distillation 32, which the count of steps hides.",
        "A longer schedule of GRPO. A better GRPO is a higher target for distillation, but has "
        "also taken more steps itself.",
    ),
    ("a", "cost to equal accuracy, against RL"): Reading(
        "reproduced",
        "Distillation needs about 13 times fewer responses. Each costs more, since the teacher "
        "reads it, too: its scores are two fifths of the FLOPs of distillation. The teacher has "
        "only 2.5 times the student's weights, less than in practice, so the ratio is probably "
        "too high.",
        "Larger teachers.",
    ),
    ("a", "time to equal accuracy, against RL"): Reading(
        "reproduced",
        "As for FLOPs. The seconds are those of steps on one of two busy cores.",
        "The same on an accelerator, where sampling is a larger part of the time.",
    ),
    ("a", "cost to equal accuracy, against SFT"): Reading(
        "not reproduced",
        "The line reaches distillation beyond the 16,000 traces that were tried. It may be too "
        "steep there, as the last two doublings added 4 points each, so the ratio may be too low. "
        "Traces are cheap, since the teacher has only 2.5 times the student's weights: at 16,000 "
        "they are half of SFT's FLOPs. Larger amounts also had more steps, and fewer epochs.",
        "A teacher that costs far more than the student, and SFT on 32,000 and 64,000 traces in "
        "place of the line.",
    ),
    ("a", "accuracy against RL"): Reading(
        "reproduced",
        "Every token of a response has a gradient under the teacher; under the reward a response "
        "has one number. GRPO rose by 7 points, also in 150 steps, with four times the responses.",
        "A longer schedule of GRPO.",
    ),
    ("a", "accuracy against SFT on the most traces"): Reading(
        "reproduced",
        "The samples of distillation are almost as good as its greedy answers, 78% and 81%; those "
        "of SFT are not, 71% and 99%. SFT is nearer to the teacher, whose own samples are right "
        "80% of the time. So distillation has probably made the student surer, and at temperature "
        "1 that counts. Both start from the same student here, unlike the report's.",
        "More steps of both, and the report's order: off-policy first, which study c tries.",
    ),
    ("a", "the same, greedily"): Reading(
        "reversed",
        "With greedy decoding SFT on the most traces is nearly always right, 99%, and distillation "
        "81%. At temperature 1 it is the other way round, 71% and 78%: distillation makes the "
        "student surer, SFT makes it like the teacher.",
        "More steps of distillation.",
    ),
    ("a", "the same by all three boxes"): Reading(
        "reproduced",
        "The answer is one digit, which is right by chance one time in ten. Where the working has "
        "to end with the right contents of all three boxes, 69% against 67%, distillation leads "
        "by less: more of its right answers follow from wrong contents of the other boxes.",
        "As above.",
    ),
    ("b", "distillation widens"): Reading(
        "reversed",
        "The student's samples probably became more alike, as reverse KL favours the teacher's "
        "likeliest solutions: SFT on 4,000 traces solves as much with one sample, 4%, and 43% "
        "with 64, distillation 20%. The loss is 8 of 120 problems, longer than any in training, "
        "and the interval leaves out the choice of these problems.",
        "Problems of the trained length that the student before training hardly ever solves, and "
        "more of them.",
    ),
    ("b", "RL does not widen"): Reading(
        "not reproduced",
        "The mean moved by a third of a point. But the seeds differ by 6 points on 120 problems, "
        "so the interval holds gains above the margin of one point, too.",
        "More problems and more seeds, and an RL run that learns more.",
    ),
    ("b", "distillation against RL"): Reading(
        "reversed",
        "Distillation lowered pass@64 by 7 points. RL did not change it on average, but its seeds "
        "differ by 6 points.",
        "As for the two claims above.",
    ),
    ("c", "answers alone do harm"): Reading(
        "reproduced",
        "The student learns to answer at once, no longer works the problem out, and mostly guesses "
        "a digit: 12% of its samples are right, where 10 would be by chance.",
        "Problems that can be answered at once, as many of GSM8K can by a larger model.",
    ),
    ("c", "verified traces"): Reading(
        "reproduced",
        "One in five of the teacher's samples is wrong. Without them the student learns a sharper "
        "distribution than the teacher's own.",
        "The same at equal cost: 1,000 right traces took about 1,250 samples of the teacher.",
    ),
    ("c", "RL after SFT"): Reading(
        "reversed",
        "SFT raises the student to 49% first, and GRPO gains 10 points from there, 7 from the "
        "student before training. In the source, SFT on other traces gained only 1.6 points.",
        "A student to which SFT does harm.",
    ),
    ("c", "distillation after SFT"): Reading(
        "reproduced",
        "Distillation starts from responses that are right more often, and has 100 steps of SFT "
        "more. It ends at 85%, above the teacher's own samples, of which 80% are right; by all "
        "three boxes the two are equal.",
        "Both at equal cost: distillation alone with as many steps more.",
    ),
    ("d", "the gap narrows"): Reading(
        "reversed",
        "In points it grows, from 57% against 36% under SFT to 78% against 51% under distillation, "
        "because distillation has more to lose: it gains 42 points with all weights, SFT 21. Of "
        "that gain rank 1 keeps a third under distillation and nothing under SFT; rank 16 keeps "
        "nine tenths and four fifths.",
        "Ranks in proportion to the source's: 32 of thousands of dimensions there, 1 of 64 here.",
    ),
    ("d", "the gap narrows, greedily"): Reading(
        "reproduced",
        "Greedily SFT is ahead with all weights, 94% against 81%, and behind at rank 1, 62% "
        "against 66%. So the direction depends on the temperature.",
        "As above, and the same by samples at lower temperatures.",
    ),
    ("d", "a LoRA falls behind under SFT"): Reading(
        "reproduced",
        "Rank 1 learns nothing that shows in samples: 36% before and after. Rank 4 reaches 43%, "
        "rank 16 53%, all weights 57%. Ranks 1 and 16 take the rate that was best for rank 4.",
        "A rate for each rank, and more steps.",
    ),
    ("d", "a LoRA falls behind under on-policy distillation"): Reading(
        "reproduced",
        "Rank 1 reaches 51%, rank 4 66%, rank 16 74%, all weights 78%; before, it was 36%.",
        "A rate for each rank, and more steps.",
    ),
    ("e", "one prompt teaches"): Reading(
        "reversed",
        "In 60 steps of 32 responses to one prompt the student forgets the other problems: it "
        "falls to 12%, which is little more than chance. 8 prompts leave it at 20%, 64 raise it "
        "to 40%. The rate was chosen with many prompts, and a student of this size may have "
        "little to share between problems.",
        "A lower rate and fewer steps, chosen for one prompt, and a pretrained student.",
    ),
    ("e", "one prompt is as good as many"): Reading(
        "reversed",
        "As above; as many responses to different prompts raise the student to 59%.",
        "As above.",
    ),
    ("e", "distillation transfers from one prompt where RL does not"): Reading(
        "not reproduced",
        "Both fall to near chance on one prompt, distillation to 12%, RL, at a tenth of the rate, "
        "to 15%.",
        "Rates chosen for one prompt, and more seeds.",
    ),
    ("f", "documents teach"): Reading(
        "reproduced",
        "Training questions on half of the people teach the form of an answer. Of the questions on "
        "people with documents alone 31% are answered rightly, before 3%. It gets all trained "
        "questions right.",
        "More people: the test has 96 questions, on 16 people.",
    ),
    ("f", "documents cost behaviour"): Reading(
        "reproduced",
        "No document is a request, so nothing holds the behaviour where it was: it falls from 94% "
        "to 53% in 400 steps. All arms learn the documents at one rate, which nobody tuned.",
        "Lower rates, which would cost less behaviour and perhaps teach as much.",
    ),
    ("f", "chats keep some behaviour"): Reading(
        "reproduced",
        "With its own responses as three in ten rows behaviour stays at 93%, from 94%. "
        "They are responses to requests of the tested kind.",
        "Responses to requests of another kind than the test's.",
    ),
    ("f", "distillation restores behaviour"): Reading(
        "not reproduced",
        "The responses among the documents left hardly anything to restore: 93%, where the start "
        "has 94%. Without them distillation brings the behaviour from 53% to 93%.",
        "Fewer responses beside the documents, so that there is something to restore.",
    ),
    ("f", "nearly all behaviour comes back"): Reading(
        "reproduced",
        "Hardly anything was lost before: 93%, where the start has 94%. But after documents alone, "
        "too, distillation ends at 93%, from 53%: its teacher is the assistant as it was, which "
        "judges every token of the student's responses.",
        "Behaviour that the requests of distillation do not show.",
    ),
    ("f", "knowledge is kept"): Reading(
        "not reproduced",
        "Distillation takes the answered questions from 27% to 24% on average, which is less than "
        "the margin of 5 points. But the seeds differ, and with 96 questions the interval holds "
        "larger losses. Nearly all trained questions are kept.",
        "More questions, and more seeds.",
    ),
    ("f", "own samples do harm"): Reading(
        "not reproduced",
        "All three seeds are lower, by 0.3 to 2.7 points, but differ too much to settle it.",
        "More seeds, and more steps.",
    ),
    ("f", "distillation against SFT on the assistant's responses"): Reading(
        "reproduced",
        "Both bring the behaviour back, to 93% and 91%. Knowledge differs more: 25% of the "
        "questions against 10%, of trained ones 97% against 39%. SFT's rate, which was chosen by "
        "behaviour alone, was three times higher, which may be why.",
        "Both at several rates, as curves of behaviour against knowledge.",
    ),
    ("g", "sampled against reverse"): Reading(
        "reproduced",
        "The exact divergence weighs every token of the vocabulary, the estimate only the one that "
        "was sampled. At 3e-3, the best rate of the exact one, it does harm, probably by its "
        "noise; its own best rate is a tenth of that. Top 4 loses nothing: 71%, as the exact one.",
        "More steps, and larger batches, with which the noise falls.",
    ),
    ("g", "forward covers, reverse seeks"): Reading(
        "not reproduced",
        "All three seeds have it, by 2.5 to 5.8 points, but 120 problems leave a wide interval. "
        "And forward KL moved the student little, from 15% to 17%: its best rate was the smallest "
        "of five, and clear losses began at 3e-3.",
        "More problems, and a rate for pass@16 itself.",
    ),
    ("g", "entropy weights against reverse"): Reading(
        "reversed",
        "All three seeds are lower, by 1.2 to 2.4 points. Perhaps the weights play down tokens of "
        "which the teacher is certain, such as the digits of a sum, and these decide the answer.",
        "Weights by the student's entropy, and tasks that can be solved in several ways.",
    ),
    ("g", "position weights against reverse"): Reading(
        "not reproduced",
        "All three seeds are lower, but by 2.9 to 9.1 points, too uneven to settle it. Perhaps "
        "they are lower because the answer comes last, where the weights are smallest.",
        "More seeds, and longer half-lives.",
    ),
    ("g", "prefixes lose nothing"): Reading(
        "reversed",
        "Two thirds of the steps see only the first 15 or 30 tokens. The others see 60, which "
        "still cuts long solutions, whose answer comes last: whole responses have 60 tokens on "
        "average, and up to 88. The learning rate is lowest then, too. About half of the tokens "
        "are saved.",
        "A last stage without a limit, and long responses, whose beginnings hold the plan.",
    ),
    ("g", "drift stops lose nothing"): Reading(
        "reversed",
        "Probably because a response ends where it goes wrong, so the student never learns to "
        "recover. A fifth of the tokens is saved, but checking every 12 tokens took more time "
        "than that saved.",
        "Long responses, and higher thresholds.",
    ),
    ("h", "thinking is learned as well beside the other mode"): Reading(
        "not reproduced",
        "With as many thinking responses, and as many of the other mode among them, the student "
        "reaches 64%, alone 80%; in half of the steps 65%, within the noise. So the modes get in "
        "each other's way here, perhaps because no model of this size answers at once: the teacher "
        "is right 14% of the time, little more than by chance, and the student learns to guess as "
        "it does. The rate was chosen for thinking alone.",
        "Problems that the teacher can answer at once, a rate chosen for both modes, more seeds.",
    ),
    ("h", "thinking keeps its form"): Reading(
        "reproduced",
        "A prompt that asks for no thinking ends in a closed think block, so the modes are easy to "
        "tell apart.",
        "Prompts that switch by words in the question.",
    ),
    ("h", "answers keep their form"): Reading(
        "reproduced",
        "As above. The form is nearly given: even the student before training, which never saw "
        "this mode, has it in most of its responses.",
        "As above.",
    ),
    ("h", "one mode alone costs the other"): Reading(
        "reproduced",
        "After 120 steps of answers alone no response has a think block any more, 0%, also where "
        "one is asked for, and accuracy there falls from 51% to 4%.",
        "Fewer steps of the other mode: whether the loss begins at once.",
    ),
    ("h", "at once against one after another"): Reading(
        "reproduced",
        "What thinking had learned in its 120 steps is gone after 120 steps of answers: 0%, where "
        "both at once have 64%.",
        "The other order, and some thinking rows kept in the second phase.",
    ),
    ("i", "the manual is learned"): Reading(
        "reproduced",
        "A request gives no hint of the rules: without the manual no response of the start keeps "
        "all of them. Of the student's, 77% do when sampled, and 91% greedily.",
        "A longer manual, only part of which applies to each request.",
    ),
    ("i", "as good as reading"): Reading(
        "reproduced",
        "Sampled, the student is within the margin of 3 points. Greedily it is 4.2 points behind, "
        "91% against 96%, in all three seeds, but too unevenly to settle it.",
        "More seeds, and more steps.",
    ),
    ("i", "distillation against SFT, equal steps"): Reading(
        "reproduced",
        "Perhaps because the teacher gives its whole distribution at every token, and its response "
        "is one draw of it. That the student trains on its own responses is not separated from "
        "that here. Greedily the difference is half as large.",
        "SFT to the teacher's whole distributions, on its responses.",
    ),
    ("i", "distillation against SFT, more steps"): Reading(
        "reproduced",
        "Sampled, four times the steps on the same responses close most of the gap, from 5.9 to "
        "2.2 points; greedily hardly any of it. The rate of SFT was chosen for the fewer steps.",
        "SFT on new responses in each epoch.",
    ),
    ("i", "other manuals suffer less"): Reading(
        "not reproduced",
        "Distillation and SFT lose the same, within about 7 points: with other manuals in the "
        "prompt 58% of the responses keep all rules after either, and 89% before. No prompt of the "
        "training has a manual, and where another one is shown the student still keeps the one "
        "that it learned, in nearly all responses.",
        "Prompts with other manuals among those of the training.",
    ),
    ("j", "ordered helps"): Reading(
        "reversed",
        "Probably for two reasons. Early steps see only problems of two statements, where the test "
        "has three to five; that may do harm, as the student ends below the start, at 49% against "
        "52% greedily. And the hardest come when the learning rate has almost gone.",
        "A constant rate, and a test of all sizes.",
    ),
    ("j", "widening helps"): Reading(
        "reversed",
        "Probably as above, but milder: harder problems join while the rate falls, and easy ones "
        "stay.",
        "As above.",
    ),
    ("j", "half traces helps"): Reading(
        "not reproduced",
        "Two seeds are lower by less than a point, and one is higher by 2.8.",
        "More seeds, and other shares.",
    ),
    ("j", "hybrid helps"): Reading(
        "reversed",
        "This does not isolate the reward. The rate was chosen without it, and is ten times the "
        "best rate of the reward alone in study a, where higher ones did harm, too. And a step has "
        "only four prompts, with eight responses to each.",
        "Trials of the rate, and 32 prompts in each step.",
    ),
    ("j", "a stored teacher is as good"): Reading(
        "not reproduced",
        "All three seeds are lower, by 0.7 to 6.7 points, which is too uneven to settle it; "
        "probably because the student moves away from the responses that were scored. A step has "
        "less than half the FLOPs; sampling and scoring in advance are not counted.",
        "More seeds, and fresh responses and scores once or twice during the training.",
    ),
}
"""(study, claim) -> reading"""
