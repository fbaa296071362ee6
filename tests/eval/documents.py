"""Invented documents of the nine tasks, in the columns of their data sets."""

import json

_PAGE = (
  " \n = The Lantern Keepers = \n \n The keepers ' lanterns were lit at 5 : 30"
  " , and 1 @,@ 200 of them burned ; a well @-@ known one ( the oldest ) was 3"
  " @.@ 5 metres tall . \n \n = = History = = \n \n It 's said that \" the wind"
  ' [ of 1801 ] put out N lamps ! " Was it so ? At 20 ° C the'
  " oil { whale } thickens . \n = = = Later = = = \n Thérèse"
  " kept ' the last one ' . "
)
_LONG = " = A long page = \n \n " + " ".join(
  f"Stone {i} of the wall , laid in {1500 + i} , is {i * 37 % 11} feet wide ."
  for i in range(60)
)

DOCS = {
  "wikitext": [{"page": _PAGE}, {"page": _LONG}],
  "lambada_openai": [
    {"text": "the cat sat by the fire and would not leave the fire"},
    {"text": "\"Where?\" she asked.\n\nHe said nothing of the old\nhouse"},
    {"text": "two  spaces stay where they were put, said the clerk"},
    {"text": "naïve plans meet rain"},
  ],
  "piqa": [
    {"goal": "How to dry boots", "sol1": "Stuff them with paper.",
     "sol2": "Stuff them with soup. ", "label": 0},
    {"goal": "Keep a door open, ", "sol1": "pull it", "sol2": "wedge it",
     "label": 1},
    {"goal": "Open a jar", "sol1": "tap the lid on its edge",
     "sol2": "tap the lid", "label": 0},
  ],
  "hellaswag": [
    {"ind": 4, "activity_label": "Cooking eggs", "ctx_a": "[header] How to"
     " boil an egg [title] Boil water.", "ctx_b": "[step] Put the egg",
     "ctx": "unused", "endings": ["in the water. [substeps] Wait.",
     "[title] Away.", "on  the   roof.", "under the table"], "label": "0",
     "split": "val", "split_type": "indomain", "source_id": "x"},
    {"activity_label": "[header] Odd one", "ctx_a": "A man in McKay's shop",
     "ctx_b": "the McDonald tune", "endings": ["plays", "is played twice",
     "sleeps on it", "eats"], "label": 1},
  ],
  "winogrande": [
    {"sentence": "The trophy did not fit the case because the _ was too big.",
     "option1": "trophy", "option2": "case", "answer": "1"},
    {"sentence": "Ann thanked Eve since _ had helped.", "option1": "Ann",
     "option2": "Eve", "answer": "2"},
    {"sentence": "Ink met paper, and _", "option1": "ink ",
     "option2": "the paper", "answer": "2"},
  ],
  "arc_easy": [
    {"id": "a", "question": "Which of these is a metal?", "choices":
     {"text": ["wood", "iron", "wool"], "label": ["A", "B", "C"]},
     "answerKey": "B"},
    {"id": "b", "question": "What melts first?", "choices": {"text": ["ice",
     "lead", "glass", "iron", "gold"], "label": ["1", "2", "3", "4", "5"]},
     "answerKey": "1"},
  ],
  "arc_challenge": [
    {"id": "c", "question": "Why is the sky dark at night?", "choices":
     {"text": ["The Sun is below the horizon.", "It rains.", "Birds sleep.",
     "Clouds"], "label": ["A", "B", "C", "D"]}, "answerKey": "A"},
    {"id": "d", "question": "Two forces act. Which wins?", "choices":
     {"text": ["the larger", "the louder", "neither", "both"],
     "label": ["A", "B", "C", "D"]}, "answerKey": "D"},
  ],
  "social_iqa": [
    {"context": "Kai lent Robin an umbrella.", "question":
     "How does Robin feel?", "answerA": "wet", "answerB": "grateful",
     "answerC": "asleep", "label": "2"},
    {"context": "Sam missed the train.", "question": "What will Sam do?",
     "answerA": "wait", "answerB": "fly", "answerC": "sing", "label": "1"},
  ],
  "boolq": [
    {"question": "is the tower taller than the bridge", "passage":
     "Old tower -- The tower stands 80 feet tall; the bridge is 60.",
     "label": 1, "idx": 0},
    {"question": "do herons swim", "passage": "Heron -- Herons wade.",
     "label": 0, "idx": 1},
    {"question": "was it built in 1801", "passage":
     "Lighthouse -- It was begun in 1799 and finished two years later.",
     "label": 1, "idx": 2},
  ],
}  # fmt: skip


def write(folder, tasks=None, **changed):
  """Writes <task>.jsonl of the invented documents; returns the folder.

  Args:
    folder: where.
    tasks: some of them.
    **changed: other documents of a task, by its name.
  """
  folder.mkdir(parents=True, exist_ok=True)
  for task in tasks or DOCS:
    lines = [json.dumps(doc) for doc in changed.get(task, DOCS[task])]
    text = "\n".join(lines) + "\n"
    (folder / f"{task}.jsonl").write_text(text, encoding="utf-8")
  return folder
