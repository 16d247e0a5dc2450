import pytest
from datasets import Dataset, Features, Value
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from veneer.data.chat import assistant_mask, render
from veneer.data.dataset import encode_all
from veneer.data.encoding import IGNORED, Encoder, kind_of
from veneer.errors import DataError

CHAT = [
    {"role": "user", "content": "what did the cat do"},
    {"role": "assistant", "content": "the cat sat"},
    {"role": "user", "content": "and then"},
    {"role": "assistant", "content": "it ran"},
]


def trained_words(tokenizer, encoded):
    return tokenizer.decode([label for label in encoded["labels"] if label != IGNORED])


def test_text_is_trained_whole_and_ends(tokenizer):
    encoded = Encoder(tokenizer=tokenizer, kind="text")({"text": "the cat sat"}, 0)
    assert tokenizer.decode(encoded["input_ids"]) == "the cat sat <end>"
    assert trained_words(tokenizer, encoded) == "cat sat <end>"


def test_text_that_ends_already_gets_no_second_end(tokenizer):
    encoded = Encoder(tokenizer=tokenizer, kind="text")({"text": "the cat <end>"}, 0)
    assert tokenizer.decode(encoded["input_ids"]) == "the cat <end>"


@pytest.mark.parametrize(("only", "expected"), [(True, "sat on the mat <end>"), (False, "cat sat on the mat <end>")])
def test_completion_only(tokenizer, only, expected):
    row = {"prompt": "the cat", "completion": " sat on the mat"}
    encoded = Encoder(tokenizer=tokenizer, kind="prompt-completion", completion_only=only)(row, 0)
    assert trained_words(tokenizer, encoded) == expected


def test_conversational_prompt_and_completion(tokenizer):
    row = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    encoded = Encoder(tokenizer=tokenizer, kind="prompt-completion", completion_only=True)(row, 0)
    assert encoded["input_ids"] == render(tokenizer, CHAT)
    assert trained_words(tokenizer, encoded) == "it ran <end>"


def test_assistant_turns_are_found_without_markers_and_learn_to_stop(tokenizer):
    encoded = Encoder(tokenizer=tokenizer, kind="messages", assistant_only=True)({"messages": CHAT}, 0)
    assert trained_words(tokenizer, encoded) == "the cat sat <end> it ran <end>"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # told by position: a pad that is the end does no harm


def test_markers_of_the_template_are_used_where_there_are_any(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<' + m['role'] + '> ' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
        "{{ ' <end> ' }}{% endfor %}"
    )
    ids, mask = assistant_mask(tokenizer, CHAT)
    assert tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on]) == "the cat sat it ran"


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}{{ '<assistant> no ' }}{% else %}"
        "{{ '<' + m['role'] + '> ' + m['content'] + ' <end> ' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
    )
    with pytest.raises(DataError, match=r"renders earlier turns differently.*generation %\}.*completion columns"):
        assistant_mask(tokenizer, CHAT)


def test_turns_that_the_tokenizer_joins_are_told_as_such():
    letters = ["<end>", *"abu:|", "|a"]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(letters)}, merges=[("|", "a")]))
    joining = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    joining.chat_template = (
        "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '|' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )
    turns = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "ab"}]
    ids, mask = assistant_mask(joining, turns)  # "u:b" "|a" ":" and then what is trained
    assert joining.decode([i for i, on in zip(ids, mask, strict=True) if on]).replace(" ", "") == "ab|"
    turns += [{"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match="the tokenizer joins the end of one turn and the beginning of the next"):
        assistant_mask(joining, turns)


def test_a_refusing_template_is_a_data_error_that_names_row_and_roles(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"row 7: .*roles user, assistant, user, assistant: roles must alternate"):
        Encoder(tokenizer=tokenizer, kind="messages")({"messages": CHAT}, 7)


def test_no_template_at_all(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        render(tokenizer, CHAT)


def test_a_conversation_that_opens_with_the_assistant(tokenizer):
    with pytest.raises(DataError, match="opens with an assistant turn"):
        assistant_mask(tokenizer, CHAT[1:])


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("text", {"text": 3}, "row 2: column 'text' must be a string, not int"),
        ("messages", {"messages": []}, "list of messages that is not empty"),
        ("messages", {"messages": [{"content": "a"}]}, "a role and a content"),
        ("prompt-completion", {"prompt": CHAT, "completion": "a"}, "column 'completion' must be a list"),
        ("tokens", {"input_ids": [4, 5, 6], "labels": [4, 5]}, r"as long as input_ids \(3\)"),
        ("tokens", {"input_ids": [4, 5, 6], "labels": []}, r"as long as input_ids \(3\)"),
        ("messages", {"messages": CHAT, "tools": "look"}, "row 2: column 'tools' is a string that is not JSON: 'look'"),
        ("messages", {"messages": CHAT, "chat_template_kwargs": "[3]"}, "must hold names and values, not .3."),
    ],
)
def test_rows_that_do_not_fit(tokenizer, kind, row, message):
    with pytest.raises(DataError, match=message):
        Encoder(tokenizer=tokenizer, kind=kind)(row, 2)


def test_tokens_with_masks(tokenizer):
    row = {"input_ids": [4, 5, 6, 7], "assistant_masks": [0, 1, 1, 1], "completion_mask": [0, 0, 1, 1]}
    encode = Encoder(tokenizer=tokenizer, kind="tokens", completion_only=True)
    assert encode(row, 0)["labels"] == [IGNORED, IGNORED, 6, 7]
    assert Encoder(tokenizer=tokenizer, kind="tokens")(row, 0)["labels"] == [IGNORED, 5, 6, 7]


def test_labels_that_are_given_stay_as_they_are(tokenizer):
    row = {"input_ids": [4, 5, 6, 7, 8], "labels": [3, IGNORED, 9, 7, 11], "assistant_masks": [1, 1, 1, 0, 1]}
    encode = Encoder(tokenizer=tokenizer, kind="tokens", max_length=3, keep_end=True)
    assert encode(row, 0) == {"input_ids": [6, 7, 8], "labels": [IGNORED, IGNORED, 11]}
    assert Encoder(tokenizer=tokenizer, kind="tokens")(row, 0)["labels"] == [IGNORED, IGNORED, 9, IGNORED, 11]
    assert encode({"input_ids": [4, 5], "labels": None}, 0)["labels"] == [IGNORED, 5]


@pytest.mark.parametrize(("keep_end", "expected"), [(False, [5, 6, 7]), (True, [7, 8, 9])])
def test_truncation_keeps_the_asked_end(tokenizer, keep_end, expected):
    encode = Encoder(tokenizer=tokenizer, kind="tokens", max_length=3, keep_end=keep_end)
    encoded = encode({"input_ids": [5, 6, 7, 8, 9]}, 0)
    assert encoded == {"input_ids": expected, "labels": [IGNORED, *expected[1:]]}


def test_message_fields_that_a_table_fills_with_nothing_do_not_reach_the_template(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ 'yes ' if 'tool_calls' in m else 'no ' }}{% endfor %}"
    turns = [{"role": "user", "content": "a", "tool_calls": None}]
    encoded = Encoder(tokenizer=tokenizer, kind="messages")({"messages": turns}, 0)
    assert tokenizer.decode(encoded["input_ids"]) == "no"


def test_arguments_that_other_calls_have_do_not_reach_the_template(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% for c in m['tool_calls'] %}{{ c.function.arguments | list | join(' ') }}"
        "{{ ' ' }}{% endfor %}{% endfor %}{{ tools[0] | list | join(' ') }}"
    )
    calls = [{"function": {"arguments": given}} for given in ({"cat": "on"}, {"dog": "under", "bird": None})]
    rows = Dataset.from_list(
        [
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [c]}], "tools": [{"red": 1, "blue": None}]}
            for c in calls
        ]
    )
    encode = Encoder(tokenizer=tokenizer, kind="messages")
    texts = [tokenizer.decode(encode(row, 0)["input_ids"]) for row in rows]
    assert texts == ["cat red", "dog red"]


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (["messages", "text"], "messages"),
        (["prompt", "completion", "messages"], "prompt-completion"),
        (["story"], "text"),
        (["input_ids", "messages"], "tokens"),
    ],
)
def test_the_kind_of_rows(columns, kind):
    assert kind_of(columns, "story") == kind


def test_an_unknown_kind_names_the_columns():
    with pytest.raises(DataError, match=r"\['answer', 'question'\].*messages.*prompt and completion.*text"):
        kind_of(["question", "answer"], "text")


def test_a_set_in_which_every_label_is_masked(tokenizer):
    users = Dataset.from_list([{"messages": CHAT[:1]}] * 3)
    encoder = Encoder(tokenizer=tokenizer, kind="messages", assistant_only=True)
    with pytest.raises(DataError, match=r"every label of the 3 rows.*role 'assistant' in the column 'messages'"):
        encode_all(users, encoder, "train")


def test_a_prompt_that_fills_max_length_is_told(tokenizer):
    rows = Dataset.from_list([{"prompt": "the cat sat on the mat", "completion": " yes"}])
    encoder = Encoder(tokenizer=tokenizer, kind="prompt-completion", completion_only=True, max_length=5)
    with pytest.raises(DataError, match="column 'completion' after the prompt within max_length=5"):
        encode_all(rows, encoder, "train")


@pytest.mark.parametrize(("columns", "told"), [({"label": [1]}, "the train data: not used: column label"), ({}, "")])
def test_columns_that_no_encoder_reads_are_told(tokenizer, caplog, columns, told):
    rows = Dataset.from_dict({"text": ["the cat sat"], **columns})
    encode_all(rows, Encoder(tokenizer=tokenizer, kind="text"), "train")
    assert [record.getMessage() for record in caplog.records] == ([told] if told else [])


def test_rows_without_a_trained_token_are_left_out_and_counted(tokenizer, caplog):
    rows = Dataset.from_list([{"messages": CHAT}, {"messages": CHAT[:1]}])
    kept = encode_all(rows, Encoder(tokenizer=tokenizer, kind="messages", assistant_only=True), "train")
    assert len(kept) == 1
    assert "1 of 2 rows hold no trained token" in caplog.text


@pytest.mark.parametrize(("keep_end", "side"), [(False, "end"), (True, "start")])
def test_rows_that_are_cut_are_counted(tokenizer, caplog, keep_end, side):
    rows = Dataset.from_dict({"text": ["the cat sat on the mat", "the cat", "the mat sat on the cat"]})
    encode_all(rows, Encoder(tokenizer=tokenizer, kind="text", max_length=5, keep_end=keep_end), "train")
    (record,) = caplog.records
    told = f"train data: 2 of 3 rows reach max_length=5 tokens, and what is longer is cut off at the {side}: raise "
    assert record.getMessage().startswith(told)
    caplog.clear()
    encode_all(rows, Encoder(tokenizer=tokenizer, kind="text", max_length=11), "train")
    encode_all(rows, Encoder(tokenizer=tokenizer, kind="text"), "train")
    assert not caplog.records


def test_an_empty_set(tokenizer):
    empty = Dataset.from_dict({"text": []}, features=Features({"text": Value("string")}))
    with pytest.raises(DataError, match="the eval data has no rows"):
        encode_all(empty, Encoder(tokenizer=tokenizer, kind="text"), "eval")


def test_streamed_rows_are_encoded_on_the_way(tokenizer):
    stream = Dataset.from_list([{"messages": CHAT}, {"messages": CHAT[:1]}]).to_iterable_dataset()
    encoder = Encoder(tokenizer=tokenizer, kind="messages", assistant_only=True)
    assert [trained_words(tokenizer, row) for row in encode_all(stream, encoder, "train")] == [
        "the cat sat <end> it ran <end>"
    ]
