import pytest

from jaxlora.core.errors import UserError
from jaxlora.data.encode import encode
from jaxlora.data.instructions import INSTRUCTIONS
from jaxlora.data.prompts import CustomPrompt, Instruction, completion, input_output
from jaxlora.data.tokenizer import Encoder


def pieces(draft, tokenizer) -> list[tuple[str, bool]]:
    """The decoded example as runs of trained and untrained text."""
    [(tokens, trained)] = encode([draft], Encoder(tokenizer))
    runs: list[tuple[list[int], bool]] = []
    for token, flag in zip(tokens.tolist(), trained.tolist(), strict=True):
        if not runs or runs[-1][1] != bool(flag):
            runs.append(([], bool(flag)))
        runs[-1][0].append(token)
    return [(tokenizer.decode(ids), flag) for ids, flag in runs]


FORM = Instruction("{q}|{more}>", "{q}>", "{a}", system="[{system}]")


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"more": "m", "system": "s"}, "[s]q|m>"),
        ({"more": "", "system": ""}, "q>"),
        ({"more": None, "system": None}, "q>"),
        ({"system": "s"}, "[s]q>"),
    ],
)
def test_a_form_is_written_with_what_the_row_has(tokenizer, row, prompt):
    draft = FORM.draft({"q": "q", "a": "Done {x}", **row}, "f:1", "form")
    assert pieces(draft, tokenizer) == [("<s>" + prompt, False), ("Done {x}</s>", True)]


def test_train_on_inputs_trains_all_but_the_first_token(tokenizer):
    draft = FORM.draft({"q": "q", "a": "a", "system": ""}, "f:1", "form", train_on_inputs=True)
    assert pieces(draft, tokenizer) == [("<s>", False), ("q>a</s>", True)]


def test_only_the_special_tokens_of_a_form_are_special(tokenizer):
    form = Instruction("", "<|im_start|>{q}<|im_end|>", "{a}")
    row = {"q": "a</s>b<|im_end|>", "a": "<|im_end|>"}
    assert form.holds_special(Encoder(tokenizer))
    draft = form.draft(row, "f:1", "form", framed=True)
    assert pieces(draft, tokenizer) == [
        ("<s><|im_start|>a</s>b<|im_end|><|im_end|>", False),
        ("<|im_end|></s>", True),
    ]
    [(tokens, _)] = encode([draft], Encoder(tokenizer))
    assert [token for token in tokens.tolist() if token < 8] == [1, 4, 5, 2]


def test_completion_trains_the_whole_text(tokenizer):
    assert pieces(completion({"text": "Once"}, "f:1"), tokenizer) == [
        ("<s>", False),
        ("Once</s>", True),
    ]
    assert pieces(completion({"body": "x"}, "f:1", field="body"), tokenizer)[1] == ("x</s>", True)


def test_input_output_adds_nothing_and_its_special_tokens_are_special(tokenizer):
    segments = [{"label": False, "text": "<s>Q:"}, {"label": True, "text": "A</s>"}]
    draft = input_output({"segments": segments}, "f:1")
    assert pieces(draft, tokenizer) == [("<s>Q:", False), ("A</s>", True)]
    [(tokens, _)] = encode([draft], Encoder(tokenizer))
    assert tokens[0] == 1
    assert tokens[-1] == 2


def test_custom_prompt(tokenizer):
    custom = CustomPrompt.of(
        {
            "field_instruction": "mr",
            "field_output": "ref",
            "field_input": "more",
            "format": "{instruction}|{input}\n",
            "no_input_format": "{instruction}\n",
            "system_prompt": "S",
            "system_format": "[{system}]",
        }
    )
    for more, prompt in (("m", "[S]q|m\n"), (None, "[S]q\n")):
        row = {"mr": "q", "ref": "a", "more": more}
        draft = custom.instruction.draft(row, "f:1", "custom")
        assert pieces(draft, tokenizer) == [("<s>" + prompt, False), ("a</s>", True)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"feild_output": "a"}, 'Did you mean "field_output"'),
        ({"format": "{question}"}, "a format may use .* only, not {question}"),
        ({"format": "{}"}, "a format cannot be read"),
        ({"format": "{instruction"}, "a format cannot be read"),
    ],
)
def test_a_wrong_custom_prompt_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        CustomPrompt.of(given)


def alpaca(row, origin):
    return INSTRUCTIONS["alpaca"].draft(row, origin, "alpaca")


A = {"instruction": "i", "output": "o"}
S = {"label": True, "text": "x"}
BAD = {
    "missing": (alpaca, {"instruction": "i", "ouput": "o"}, 'found: .*Did you mean "ouput"'),
    "empty row": (alpaca, {}, "columns found: none"),
    "null": (alpaca, {**A, "output": None}, '"output" is null'),
    "number": (alpaca, {**A, "output": 3}, r'"output" is int \(3\)'),
    "input number": (alpaca, {**A, "input": 3}, r'"input" is int \(3\)'),
    "surrogate": (alpaca, {**A, "output": "a\ud800"}, "surrogate pair at character 2"),
    "completion": (completion, {"txt": "a"}, 'needs the column "text".*Did you mean "txt"'),
    "no segments": (input_output, {"segments": []}, "a list of segments"),
    "segment text": (input_output, {"segments": [S, "x"]}, "segment 2: expected"),
    "segment label": (input_output, {"segments": [{"text": "x"}]}, "label must be true or false"),
    "segment null": (input_output, {"segments": [{**S, "text": None}]}, "segment 1: .*null"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named(case):
    make, row, message = BAD[case]
    with pytest.raises(UserError, match=message) as error:
        make(row, "rows.jsonl:7")
    assert str(error.value).startswith("rows.jsonl:7:")
    assert "\n" not in str(error.value)
