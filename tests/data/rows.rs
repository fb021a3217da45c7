//! Bytes of a data file in, rows or problems out.

use std::fs;

use proptest::prelude::*;
use serde_json::json;
use tunesmith::data::{
    DataError, FORMATS, MAX_LINE_BYTES, RowBody, choose_examples, duplicates, few_shot, parse_rows,
    questions, read_rows, shared_prompts,
};

/// A line that is no valid row, and the codes of its problems in order.
const BAD_LINES: &[(&str, &[&str])] = &[
    ("{", &["invalid_json"]),
    (r#"{"messages":[]} trailing"#, &["invalid_json"]),
    ("[1]", &["data_type"]),
    ("7", &["data_type"]),
    (r#"{"words":"hello"}"#, &["missing_messages_list"]),
    (r#"{"text":""}"#, &["missing_content"]),
    (r#"{"text":["a"]}"#, &["wrong_type"]),
    (r#"{"conversations":"a"}"#, &["missing_messages_list"]),
    (r#"{"conversations":[{"from":"nobody","value":"a"}]}"#, &["unrecognized_role"]),
    (
        r#"{"conversations":[{"from":"human","value":"a"},{"from":"function_call","value":"f()"}]}"#,
        &["invalid_tool_call"],
    ),
    (r#"{"conversations":[{"from":"human","value":"a"}]}"#, &["example_missing_assistant_message"]),
    (r#"{"instruction":"a"}"#, &["missing_completion"]),
    (r#"{"prompt":"a","completion":"b","label":false}"#, &["unpaired_preference"]),
    (
        r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"kto_tag":true}"#,
        &["unpaired_preference"],
    ),
    (r#"{"instruction":"a","output":3}"#, &["wrong_type"]),
    (r#"{"instruction":"a","output":"b","history":["c"]}"#, &["wrong_type"]),
    (r#"{"messages":[]}"#, &["missing_messages_list"]),
    (r#"{"messages":{"role":"user"}}"#, &["missing_messages_list"]),
    (r#"{"messages":[{"role":"user","content":"a"}]}"#, &["example_missing_assistant_message"]),
    (r#"{"messages":["a",{"role":"assistant","content":"b"}]}"#, &["data_type"]),
    (
        r#"{"messages":[{"content":"a"},{"role":"assistant","content":"b"}]}"#,
        &["message_missing_key"],
    ),
    (
        r#"{"messages":[{"role":"user"},{"role":"assistant","content":"b"}]}"#,
        &["message_missing_key"],
    ),
    (
        r#"{"messages":[{"role":"user","content":"a","x":1},{"role":"assistant","content":"b"}]}"#,
        &["message_unrecognized_key"],
    ),
    (
        r#"{"messages":[{"role":"human","content":"a"},{"role":"assistant","content":"b"}]}"#,
        &["unrecognized_role"],
    ),
    (
        r#"{"messages":[{"role":3,"content":"a"},{"role":"assistant","content":"b"}]}"#,
        &["unrecognized_role"],
    ),
    (
        r#"{"messages":[{"role":"user","content":5},{"role":"assistant","content":"b"}]}"#,
        &["missing_content"],
    ),
    (
        r#"{"messages":[{"role":"user","content":""},{"role":"assistant","content":"b"}]}"#,
        &["missing_content"],
    ),
    (
        r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":null}]}"#,
        &["missing_content"],
    ),
    (
        r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]},{"role":"assistant","content":"b"}]}"#,
        &["missing_content"],
    ),
    (
        r#"{"messages":[{"role":"user","content":"a","name":4},{"role":"assistant","content":"b"}]}"#,
        &["wrong_type"],
    ),
    (
        r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","weight":2}]}"#,
        &["invalid_weight"],
    ),
    (
        r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","weight":"1"}]}"#,
        &["invalid_weight"],
    ),
    (
        r#"{"messages":[{"role":"user","content":"a","weight":1},{"role":"assistant","content":"b"}]}"#,
        &["invalid_weight"],
    ),
    (
        r#"{"messages":[{"role":"tool","content":"a"},{"role":"assistant","content":"b"}]}"#,
        &["message_missing_key"],
    ),
    (
        r#"{"messages":[{"role":"function","content":"a"},{"role":"assistant","content":"b"}]}"#,
        &["message_missing_key"],
    ),
    (r#"{"messages":[{"role":"assistant","tool_calls":[]}]}"#, &["invalid_tool_call"]),
    (
        r#"{"messages":[{"role":"assistant","tool_calls":[{"id":"1","type":"function","function":{"name":"f","arguments":"{"}}]}]}"#,
        &["invalid_arguments"],
    ),
    (
        r#"{"messages":[{"role":"assistant","tool_calls":[{"id":"1","type":"function","function":{"name":"f","arguments":{}}}]}]}"#,
        &["invalid_arguments"],
    ),
    (
        r#"{"messages":[{"role":"assistant","tool_calls":[{"type":"function","function":{"arguments":"{}"}}]}]}"#,
        &["invalid_tool_call", "invalid_tool_call"],
    ),
    (r#"{"messages":[{"role":"assistant","function_call":{"name":"f"}}]}"#, &["invalid_arguments"]),
    (
        r#"{"messages":[{"role":"user","content":"a","tool_calls":[{"id":"1","type":"function","function":{"name":"f","arguments":"{}"}}]},{"role":"assistant","content":"b"}]}"#,
        &["message_unrecognized_key"],
    ),
    (r#"{"messages":[{"role":"assistant","content":"b"}],"tools":{}}"#, &["invalid_tools"]),
    (
        r#"{"messages":[{"role":"assistant","content":"b"}],"tools":[{"name":"f"}]}"#,
        &["invalid_tools"],
    ),
    (
        r#"{"messages":[{"role":"assistant","content":"b"}],"parallel_tool_calls":"no"}"#,
        &["wrong_type"],
    ),
    (
        r#"{"messages":[{"role":"x","content":"a","y":1},{"role":"user"}]}"#,
        &[
            "message_unrecognized_key",
            "unrecognized_role",
            "message_missing_key",
            "example_missing_assistant_message",
        ],
    ),
    (r#"{"prompt":"a"}"#, &["missing_completion"]),
    (r#"{"completion":"a"}"#, &["missing_prompt"]),
    (r#"{"prompt":"a","completion":""}"#, &["missing_content"]),
    (r#"{"prompt":"a","completion":[{"role":"assistant","content":"b"}]}"#, &["wrong_type"]),
    (r#"{"prompt":1,"completion":null}"#, &["wrong_type"]),
    (
        r#"{"prompt":[{"role":"assistant","content":"a"}],"completion":[{"role":"user","content":"b"}]}"#,
        &["example_missing_assistant_message"],
    ),
    (r#"{"prompt":"a","chosen":"b"}"#, &["missing_non_preferred"]),
    (r#"{"prompt":"a","rejected":"b","chosen":null}"#, &["missing_preferred"]),
    (
        r#"{"input":{"messages":[{"role":"user","content":"a"}]}}"#,
        &["missing_preferred", "missing_non_preferred"],
    ),
    (r#"{"prompt":"a","chosen":"b","rejected":"b"}"#, &["identical_outputs"]),
    (r#"{"prompt":"a","chosen":"b","rejected":""}"#, &["missing_content"]),
    (r#"{"chosen":"a b","rejected":"a c"}"#, &["wrong_type"]),
    (r#"{"input":"a","preferred_output":[],"non_preferred_output":[]}"#, &["wrong_type"]),
    (
        r#"{"input":{"messages":[{"role":"user","content":"a"}]},"preferred_output":[{"role":"user","content":"b"}],"non_preferred_output":[]}"#,
        &["last_message_not_assistant", "last_message_not_assistant"],
    ),
    (
        r#"{"chosen":[{"role":"assistant","content":"a"}],"rejected":[{"role":"assistant","content":"b"}]}"#,
        &["missing_prompt"],
    ),
    (
        r#"{"chosen":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"rejected":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#,
        &["identical_outputs"],
    ),
];

#[test]
fn every_bad_line_is_named_with_its_code_and_all_at_once() {
    let good = FORMATS[0].example;
    let mut file = String::new();
    let mut expected = Vec::new();
    for (index, (line, codes)) in BAD_LINES.iter().enumerate() {
        file.push_str(&format!("{good}\n{line}\n"));
        expected.extend(codes.iter().map(|code| (2 * index + 2, *code)));
    }
    let (rows, errors) = parse_rows(file.as_bytes());
    let found: Vec<_> = errors.iter().map(|error| (error.line, error.code)).collect();
    assert_eq!(found, expected);
    assert_eq!(rows.len(), BAD_LINES.len(), "the good lines between them");
}

#[test]
fn every_formats_example_is_read_by_that_format() {
    for format in FORMATS {
        let row = serde_json::from_str(format.example).unwrap();
        let detected = FORMATS.iter().find(|other| (other.detect)(&row)).unwrap();
        assert_eq!(detected.name, format.name);
        let (rows, errors) = parse_rows(format.example.as_bytes());
        assert_eq!((rows.len(), errors), (1, vec![]), "{}", format.name);
    }
}

#[test]
fn byte_order_mark_carriage_returns_and_blank_lines_are_no_problem() {
    let row = FORMATS[1].example;
    let (rows, errors) = parse_rows(format!("\u{feff}{row}\r\n{row}\r\n\r\n").as_bytes());
    assert_eq!(errors, vec![]);
    assert_eq!(rows.iter().map(|row| row.line).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(rows[0].body, rows[1].body);
}

#[test]
fn bytes_that_are_not_utf8_are_named_by_line_and_place() {
    let bytes = [FORMATS[1].example.as_bytes(), b"\n{\"prompt\":\"\xff\"}\n"].concat();
    let (_, errors) = parse_rows(&bytes);
    assert_eq!((errors[0].line, errors[0].code), (2, "invalid_utf8"));
    assert!(errors[0].message.contains("byte 12"), "{}", errors[0]);
}

#[test]
fn a_long_line_is_read_and_an_endless_one_refused() {
    let row = |len: usize| format!(r#"{{"prompt":"{}","completion":"b"}}"#, "a".repeat(len));
    let (rows, errors) = parse_rows(row(2 << 20).as_bytes());
    assert_eq!((rows.len(), errors.len()), (1, 0));
    let (rows, errors) = parse_rows(row(MAX_LINE_BYTES).as_bytes());
    assert_eq!((rows.len(), errors[0].code), (0, "line_too_long"));
}

#[test]
fn a_json_array_has_rows_and_problems_by_their_number() {
    let (rows, errors) = parse_rows(
        b"[\n  {\"prompt\": \"a\", \"completion\": \"b\"},\n  {\"prompt\": \"b\"},\n 7\n]\n",
    );
    assert_eq!((rows.len(), rows[0].line), (1, 1));
    let found: Vec<_> = errors.iter().map(|error| (error.line, error.code)).collect();
    assert_eq!(found, [(2, "missing_completion"), (3, "data_type")]);
}

#[test]
fn files_that_are_missing_empty_or_bad_say_so() {
    let dir = std::env::temp_dir().join(format!("tunesmith-rows-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let missing = read_rows(&dir.join("missing.jsonl")).unwrap_err();
    assert!(matches!(missing, DataError::Io { .. }), "{missing}");
    fs::write(dir.join("empty.jsonl"), "\n\n").unwrap();
    let empty = read_rows(&dir.join("empty.jsonl")).unwrap_err();
    assert!(matches!(empty, DataError::Empty { .. }), "{empty}");
    fs::write(dir.join("bad.jsonl"), "{\n7\n").unwrap();
    let DataError::Rows { errors, .. } = read_rows(&dir.join("bad.jsonl")).unwrap_err() else {
        panic!("rows expected");
    };
    assert_eq!(errors.len(), 2);
    fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn weights_decide_which_assistant_messages_are_trained() {
    let body = only_row(
        r#"{"messages":[{"role":"developer","content":"d"},{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]},
        {"role":"assistant","content":"c","weight":0},{"role":"user","content":"d"},{"role":"assistant","content":"e","weight":1},
        {"role":"assistant","content":"f"}]}"#,
    );
    let RowBody::Chat { messages, trained, tools } = body else { panic!("chat expected") };
    assert_eq!(trained, [false, false, false, false, true, true]);
    assert_eq!(messages[0], json!({"role": "system", "content": "d"}));
    assert_eq!(messages[1], json!({"role": "user", "content": "a\nb"}));
    assert_eq!(messages[2], json!({"role": "assistant", "content": "c"}));
    assert_eq!(tools, None);
}

#[test]
fn tool_calls_need_no_content_and_functions_are_tools() {
    let body = only_row(
        r#"{"messages":[{"role":"user","content":"weather?"},{"role":"assistant","content":null,"tool_calls":[{"id":"c1","type":"function",
        "function":{"name":"get","arguments":"{\"place\":\"SF\"}"}}]},{"role":"tool","tool_call_id":"c1","content":""},
        {"role":"assistant","function_call":{"name":"get","arguments":"{}"}}],"functions":[{"name":"get"}],"parallel_tool_calls":false}"#,
    );
    let RowBody::Chat { trained, tools, .. } = body else { panic!("chat expected") };
    assert_eq!(trained, [false, true, false, true]);
    assert_eq!(tools, Some(vec![json!({"type": "function", "function": {"name": "get"}})]));
}

#[test]
fn a_conversational_completion_is_trained_and_its_prompt_is_not() {
    let body = only_row(
        r#"{"prompt":[{"role":"user","content":"a"},{"role":"assistant","content":"b"},{"role":"user","content":"c"}],
        "completion":[{"role":"assistant","content":"d"}]}"#,
    );
    let RowBody::Chat { messages, trained, .. } = body else { panic!("chat expected") };
    assert_eq!((messages.len(), trained), (4, vec![false, false, false, true]));
}

#[test]
fn examples_stand_between_the_system_message_and_the_question() {
    let row = |question: &str, answer: &str| {
        json!({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": question},
            {"role": "assistant", "content": answer}]})
        .to_string()
    };
    let (rows, _) = parse_rows(format!("{}\n{}", row("q1", "a1"), row("q2", "a2")).as_bytes());
    let questions = questions(&rows);
    assert_eq!(questions[0].answer, "a1");
    let prompted = few_shot(&questions[..1], &questions);
    let said: Vec<_> =
        prompted[0].messages.iter().map(|m| m["content"].as_str().unwrap()).collect();
    assert_eq!(said, ["s", "q2", "a2", "q1"], "and a question never shows itself");
    assert_eq!(prompted[0].answer, "a1");
}

#[test]
fn raw_prompts_get_raw_examples() {
    let (rows, _) = parse_rows(
        b"{\"prompt\":\"1+1=\",\"completion\":\"2\"}\n{\"prompt\":\"2+2=\",\"completion\":\"4\"}",
    );
    let questions = questions(&rows);
    let prompted = few_shot(&questions[1..], &questions[..1]);
    assert_eq!(prompted[0].raw_prompt.as_deref(), Some("1+1=2\n\n2+2="));
}

#[test]
fn chosen_examples_depend_on_the_seed_alone() {
    let file: String =
        (0..40).map(|n| format!("{{\"prompt\":\"{n}\",\"completion\":\"{n}\"}}\n")).collect();
    let (rows, _) = parse_rows(file.as_bytes());
    let lines = |k, seed| -> Vec<usize> {
        choose_examples(&rows, k, seed).iter().map(|example| example.line).collect()
    };
    assert_eq!(lines(3, 7), lines(3, 7));
    assert_ne!(lines(3, 7), lines(3, 8));
    assert_eq!(lines(3, 7), lines(5, 7)[..3]);
    assert_eq!(lines(99, 1).len(), 40);
}

#[test]
fn duplicates_and_rows_shared_with_validation_are_found() {
    let row = |prompt: &str, completion: &str| {
        format!("{{\"prompt\":\"{prompt}\",\"completion\":\"{completion}\"}}\n")
    };
    let (train, _) = parse_rows([row("a", "1"), row("b", "2"), row("a", "1")].concat().as_bytes());
    assert_eq!(duplicates(&train), [(3, 1)]);
    let (valid, _) = parse_rows([row("b", "3"), row("c", "1"), row("a", "1")].concat().as_bytes());
    let shared: Vec<_> = shared_prompts(&train, &valid)
        .iter()
        .map(|shared| (shared.valid_line, shared.train_line, shared.same_answer))
        .collect();
    assert_eq!(shared, [(1, 2, false), (3, 1, true)]);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_lines_are_problems_of_their_own_line_and_never_a_panic(
        which in 0..BAD_LINES.len(), at in 0_usize..400, byte: u8,
    ) {
        let good = FORMATS[0].example;
        let mut line = BAD_LINES[which].0.as_bytes().to_vec();
        let at = at % line.len();
        line[at] = if byte == b'\n' { b' ' } else { byte };
        let file = [good.as_bytes(), &line, good.as_bytes()].join(&b'\n');
        let (rows, errors) = parse_rows(&file);
        prop_assert!(errors.iter().all(|error| error.line == 2));
        let lines: Vec<_> = rows.iter().map(|row| row.line).filter(|line| *line != 2).collect();
        prop_assert_eq!(lines, [1, 3]);
        // A line is a row or has problems; a damaged brace may also leave it blank.
        let is_row = rows.iter().any(|row| row.line == 2);
        let is_blank = line.trim_ascii().is_empty();
        prop_assert!(is_blank || is_row == errors.is_empty());
    }
}

fn only_row(row: &str) -> RowBody {
    let row = row.replace('\n', " ");
    let (rows, errors) = parse_rows(row.as_bytes());
    assert_eq!(errors, vec![]);
    rows.into_iter().next().unwrap().body
}
