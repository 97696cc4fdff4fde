import json

import pytest

from jaxlora.data.instructions import alpaca_prompt
from jaxlora.data.prepare import prepare
from jaxlora.data.scoring import examples_for_scoring, table_for_scoring
from jaxlora.data.spec import DataOptions, DatasetSpec

ALPACA = [{"instruction": f"Do {i}", "output": f"Done {i}."} for i in range(4)]
TALK = [
    {"role": "user", "content": "Q0"},
    {"role": "assistant", "content": "A0"},
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
]


def spec_of(tmp_path, rows, kind, **settings) -> DatasetSpec:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return DatasetSpec(str(path), kind, **settings)


@pytest.mark.parametrize("name", ["tokenizer", "llama2"])
@pytest.mark.parametrize("train_on_inputs", [True, False])
def test_alpaca_prompts_and_answers(request, tmp_path, name, train_on_inputs):
    tokenizer = request.getfixturevalue(name)
    spec = spec_of(tmp_path, ALPACA, "alpaca")
    options = DataOptions(512, train_on_inputs=train_on_inputs)
    found = examples_for_scoring(spec, options, tokenizer, limit=3)
    assert [expected for _, expected in found] == ["Done 0.", "Done 1.", "Done 2."]
    assert found[0][0] == tokenizer.encode(alpaca_prompt("Do 0"))


def test_only_the_last_answer_of_a_conversation_is_asked_for(tokenizer, tmp_path):
    spec = spec_of(tmp_path, [{"messages": TALK}], "chat_template", chat_template="chatml")
    [(prompt, expected)] = examples_for_scoring(spec, DataOptions(512), tokenizer)
    assert expected == "A2"
    assert tokenizer.decode(prompt).endswith(
        "A1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_end_token_that_the_tokenizer_does_not_know_is_left_out(llama2, tmp_path):
    spec = spec_of(tmp_path, [{"messages": TALK}], "chat_template", chat_template="chatml")
    [(_, expected)] = examples_for_scoring(spec, DataOptions(512), llama2)
    assert expected == "A2"


def test_a_prepared_table_gives_the_same(tokenizer, tmp_path):
    spec = spec_of(tmp_path, ALPACA, "alpaca")
    options = DataOptions(512, dataset_prepared_path=str(tmp_path / "cache"))
    table = prepare([spec], [], options, tokenizer).train
    assert table_for_scoring(table, tokenizer, 2) == examples_for_scoring(
        spec, options, tokenizer, 2
    )
