//! The containers, forms and mixtures that rows come in, through `tunesmith check` and `train`.

use std::{
    fs,
    io::Write,
    path::Path,
    process::{Command, Output},
};

use crate::common::{TempDir, fixture};
use serde_json::{Value, json};
use tunesmith::data::{Columns, Reading, RowBody, parse_rows, read_valid_rows};

fn tunesmith(dir: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tunesmith"));
    command.current_dir(dir).args(arguments).output().unwrap()
}

/// What `check --json` says of a path.
fn check(dir: &Path, arguments: &[&str]) -> Value {
    let model = fixture("tiny-llama").display().to_string();
    let all = [&["check"], arguments, &["--model", &model, "--json"]].concat();
    let output = tunesmith(dir, &all);
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)))
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// The conversation of the only row.
fn messages(row: &Value) -> Vec<Value> {
    let (mut rows, errors) = parse_rows(row.to_string().as_bytes());
    assert_eq!(errors, vec![], "{row}");
    let RowBody::Chat { messages, .. } = rows.remove(0).body else { panic!("chat expected") };
    messages
}

#[test]
fn the_same_rows_in_every_container_are_the_same_data() {
    let dir = TempDir::new();
    let rows = [("2 + 2 =", " 4"), ("a \"b\",", " c\nd"), ("ä", " ö")]
        .map(|(prompt, completion)| json!({"prompt": prompt, "completion": completion}));
    let lines = rows.iter().map(Value::to_string).collect::<Vec<_>>().join("\n");
    let array = serde_json::to_string_pretty(&rows).unwrap();
    let csv = "prompt,completion\n2 + 2 =, 4\n\"a \"\"b\"\",\",\" c\nd\"\nä, ö\n";
    let tsv = "prompt\tcompletion\n2 + 2 =\t 4\n\"a \"\"b\"\",\"\t\" c\nd\"\nä\t ö\n";
    for (name, bytes) in [
        ("rows.jsonl", lines.clone().into_bytes()),
        ("rows.json", array.clone().into_bytes()),
        ("bom.json", format!("\u{feff}{array}").into_bytes()),
        ("rows.csv", csv.as_bytes().to_vec()),
        ("bom.csv", format!("\u{feff}{}", csv.replace("ö\n", "ö\r\n")).into_bytes()),
        ("rows.tsv", tsv.as_bytes().to_vec()),
        // As a table tool writes them where a comma is part of a number.
        (
            "semicolons.csv",
            b"prompt;completion\n2 + 2 =; 4\n\"a \"\"b\"\",\";\" c\nd\"\n\xc3\xa4; \xc3\xb6\n"
                .to_vec(),
        ),
        ("told.csv", format!("sep=;\r\n{}", tsv.replace('\t', ";")).into_bytes()),
        ("tabs.csv", tsv.as_bytes().to_vec()),
        ("quoted.csv", tsv.replace('\t', "|").replace("completion", "\"completion\"").into_bytes()),
        ("rows.jsonl.gz", gzip(lines.as_bytes())),
        ("rows.csv.gz", gzip(csv.as_bytes())),
        // By its bytes, whatever its name.
        ("rows", gzip(&gzip(lines.as_bytes()))),
    ] {
        fs::write(dir.join(name), bytes).unwrap();
        let report = check(&dir.0, &[name]);
        let lengths = (&report["examples"], &report["tokens"], &report["trained_tokens"]);
        let expected = check(&dir.0, &["rows.jsonl"]);
        let expected = (&expected["examples"], &expected["tokens"], &expected["trained_tokens"]);
        assert_eq!(lengths, expected, "{name}: {report}");
        assert_eq!((&report["rows"], &report["num_errors"]), (&json!(3), &json!(0)), "{name}");
    }
}

#[test]
fn broken_containers_are_problems_with_a_place() {
    let dir = TempDir::new();
    let half = gzip(b"{\"text\":\"a\"}\n".repeat(1000).as_slice());
    for (name, bytes, line, code) in [
        ("half.gz", &half[..half.len() / 2], 1, "invalid_gzip"),
        ("cells.csv", b"text,x\na,1\nb\n".as_slice(), 3, "invalid_csv"),
        ("empty.csv", b"prompt,completion\na,b\nc,\n", 3, "missing_completion"),
        ("windows.csv", b"prompt,completion\r\n\"a\r\nb\",c\r\nd,\r\n", 4, "missing_completion"),
        ("first.csv", b"prompt,completion\r\na,\r\n", 2, "missing_completion"),
        ("blank.csv", b"prompt,completion\n\n\nc,\n", 4, "missing_completion"),
        ("told.csv", b"sep=;\nprompt;completion\na;b\na;b;c\n", 4, "invalid_csv"),
        ("broken.parquet", b"PAR1 and nothing else", 1, BROKEN_PARQUET),
    ] {
        fs::write(dir.join(name), bytes).unwrap();
        let report = check(&dir.0, &[name]);
        let found = (&report["errors"][0]["line"], &report["errors"][0]["code"]);
        assert_eq!(found, (&json!(line), &json!(code)), "{name}: {report}");
    }
    // The text has what the first line did not: whoever reads it sees what was taken for the border.
    fs::write(dir.join("text.csv"), "prompt;completion\na;b;c\n").unwrap();
    let message = check(&dir.0, &["text.csv"])["errors"][0]["message"].clone();
    let expected =
        "the record has 3 cells, the first line names 2 columns, with semicolons between them";
    assert_eq!(message, expected);
}

#[cfg(feature = "parquet")]
const BROKEN_PARQUET: &str = "invalid_parquet";
#[cfg(not(feature = "parquet"))]
const BROKEN_PARQUET: &str = "unsupported_container";

#[cfg(feature = "parquet")]
#[test]
fn parquet_has_texts_numbers_and_lists_of_messages() {
    let dir = fixture("rows");
    let same = check(&dir, &["chat.jsonl"]);
    for name in ["chat.parquet", "chat-gzip.parquet"] {
        let report = check(&dir, &[name]);
        for key in ["rows", "examples", "tokens", "trained_tokens", "num_errors", "kind"] {
            assert_eq!(report[key], same[key], "{key} of {name}: {report}");
        }
        assert_eq!((&report["rows"], &report["num_errors"]), (&json!(3), &json!(0)));
    }
}

#[test]
fn columns_of_other_names_are_read_as_the_mapping_says() {
    let dir = TempDir::new();
    fs::write(dir.join("qa.csv"), "id,question,answer\n1,one,two\n2,three,four\n").unwrap();
    let report = check(&dir.0, &["qa.csv", "--columns", "question=prompt,answer=completion"]);
    assert_eq!((&report["rows"], &report["kind"]), (&json!(2), &json!("prompt_completion")));
    let report = check(&dir.0, &["qa.csv"]);
    assert_eq!(report["num_errors"], 2, "{report}");
    let report = check(&dir.0, &["qa.csv", "--columns", "q=prompt,answer=completion"]);
    let message = report["errors"][0]["message"].as_str().unwrap();
    assert!(message.contains("no column \"q\"; there are [\"id\", \"question\""), "{message}");
    let report = check(&dir.0, &["qa.csv", "--text-column", "answer"]);
    assert_eq!((&report["rows"], &report["trained_tokens"]), (&json!(2), &json!(6)), "{report}");

    // A column of messages, as a list or as text, and tools beside it.
    let turns = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
    let tools = json!([{"type": "function", "function": {"name": "f"}}]).to_string();
    let rows = [json!({"talk": turns, "tools": tools}), json!({"talk": turns.to_string()})];
    fs::write(dir.join("talk.jsonl"), format!("{}\n{}", rows[0], rows[1])).unwrap();
    let columns = Columns::new();
    let reading = Reading { columns: Some(&columns), text_column: Some("talk") };
    let (rows, errors) = read_valid_rows(&dir.join("talk.jsonl"), reading).unwrap();
    assert_eq!((rows.len(), errors), (2, vec![]));
    let RowBody::Chat { messages, tools, .. } = &rows[0].body else { panic!("chat expected") };
    assert_eq!((messages.len(), tools.as_ref().map(Vec::len)), (2, Some(1)));
    // As a table tool prints a list into a cell.
    let cell = "\"[{'role': 'user', 'content': 'it\\'s'}, {'role': 'assistant', 'content': 'b'}]\"";
    fs::write(dir.join("talk.csv"), format!("n,messages\n1,{cell}\n")).unwrap();
    let report = check(&dir.0, &["talk.csv"]);
    assert_eq!((&report["rows"], &report["kind"]), (&json!(1), &json!("chat")), "{report}");
}

#[test]
fn conversations_and_instructions_become_messages() {
    let row = json!({"system": "S", "tools": "[{\"name\": \"get\"}]", "conversations": [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": "{\"name\": \"get\", \"arguments\": {\"x\": 1}}"},
        {"from": "observation", "value": "7"}, {"from": "gpt", "value": "seven"}]});
    let found = messages(&row);
    let roles: Vec<_> = found.iter().map(|message| message["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["system", "user", "assistant", "tool", "assistant"]);
    assert_eq!(found[2]["tool_calls"][0]["function"]["arguments"], "{\"x\":1}");
    assert_eq!(found[2]["tool_calls"][0]["id"], found[3]["tool_call_id"]);

    let row = json!({"instruction": "Add.", "input": "1 2", "output": "3", "system": "S",
        "history": [["q", "a"]]});
    let expected = json!([{"role": "system", "content": "S"}, {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"}, {"role": "user", "content": "Add.\n1 2"},
        {"role": "assistant", "content": "3"}]);
    assert_eq!(Value::from(messages(&row)), expected);

    // Preferences in both forms.
    for row in [
        json!({"conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}),
        json!({"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}),
        json!({"prompt": "q", "chosen": [{"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"}], "rejected": [{"role": "user", "content": "q"},
            {"role": "assistant", "content": "b"}]}),
    ] {
        let (rows, errors) = parse_rows(row.to_string().as_bytes());
        assert_eq!(errors, vec![], "{row}");
        let RowBody::Preference { chosen, rejected } = &rows[0].body else { panic!("{row}") };
        let [chosen, rejected] = [chosen, rejected].map(|side| match &**side {
            RowBody::Chat { messages, .. } => messages.clone(),
            RowBody::PromptCompletion { .. } | RowBody::Preference { .. } => panic!("{row}"),
        });
        let answer = |text: &str| {
            vec![
                json!({"role": "user", "content": "q"}),
                json!({"role": "assistant", "content": text}),
            ]
        };
        assert_eq!((chosen, rejected), (answer("a"), answer("b")), "{row}");
    }
}

#[test]
fn a_folder_gives_its_training_files_and_a_pattern_those_that_fit() {
    let dir = TempDir::new();
    fs::create_dir_all(dir.join("rows")).unwrap();
    let row = |text: &str| format!("{}\n", json!({"text": text}));
    for (name, rows) in [
        ("train-00000-of-00002.jsonl", row("a") + &row("b")),
        ("train-00001-of-00002.jsonl", row("c")),
        ("test.jsonl", row("d")),
        ("README.md", "# not rows\n".to_owned()),
    ] {
        fs::write(dir.join("rows").join(name), rows).unwrap();
    }
    assert_eq!(check(&dir.0, &["rows"])["rows"], 3);
    assert_eq!(check(&dir.0, &["rows/*.jsonl"])["rows"], 4);
    assert_eq!(check(&dir.0, &["rows/train-00000-*"])["rows"], 2);
    let nothing = tunesmith(&dir.0, &["check", "rows/*.csv"]);
    let error = String::from_utf8_lossy(&nothing.stderr).into_owned();
    assert!(error.contains("rows/*.csv: no file matches this pattern"), "{error}");
}

#[test]
fn a_mixture_repeats_and_thins_out_its_sources_by_weight() {
    let dir = TempDir::new();
    let rows = |word: &str, count: usize| {
        let row = |n| json!({"question": format!("{word} {n}"), "answer": "yes"}).to_string();
        (0..count).map(row).collect::<Vec<_>>().join("\n")
    };
    fs::write(dir.join("few.jsonl"), rows("few", 4)).unwrap();
    fs::write(dir.join("many.jsonl"), rows("many", 20)).unwrap();
    let config = json!({"model": fixture("tiny-llama"), "output": "out", "rank": 2, "epochs": 1,
        "data": [{"path": "few.jsonl", "weight": 3}, {"path": "many.jsonl", "weight": 0.5}],
        "columns": {"prompt": "question", "completion": "answer"}});
    fs::write(dir.join("run.yaml"), config.to_string()).unwrap();
    let run = |output: &str| {
        let output = tunesmith(&dir.0, &["train", "--config", "run.yaml", "--output", output]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        text
    };
    let text = run("one");
    assert!(text.contains("few.jsonl: weight 3 makes 12 examples of 4"), "{text}");
    assert!(text.contains("many.jsonl: weight 0.5 makes 10 examples of 20"), "{text}");
    assert!(!text.contains("repeat an earlier one"), "{text}");
    // The same file twice is as many repeated rows.
    let twice =
        ["train", "--config", "run.yaml", "--output", "twice", "--data", "few.jsonl", "--data"];
    let output = tunesmith(&dir.0, &[&twice[..], &["few.jsonl", "--max-steps", "1"]].concat());
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("train: 4 rows repeat an earlier one: line 5 as line 1, "), "{said}");
    let digest =
        |text: &str| text.lines().find(|line| line.starts_with("digest")).map(str::to_owned);
    assert_eq!(digest(&text), digest(&run("two")), "the same seed takes the same rows");
    let card = fs::read_to_string(dir.join("one/tunesmith_card.json")).unwrap();
    let card: Value = serde_json::from_str(&card).unwrap();
    assert_eq!(card["num_examples"], 22);
    assert_eq!(card["configuration"]["data"].as_array().unwrap().len(), 2);
}

#[test]
fn with_auto_only_a_completion_is_trained_and_of_other_rows_all() {
    let dir = TempDir::new();
    let turn = |role: &str, text: &str| json!({"role": role, "content": text});
    let (question, answer) = (turn("user", "question"), turn("assistant", "answer"));
    let whole = json!({"messages": [question.clone(), answer.clone()]}).to_string();
    let parts = json!({"prompt": [question], "completion": [answer]}).to_string();
    fs::write(dir.join("whole.jsonl"), whole).unwrap();
    fs::write(dir.join("parts.jsonl"), parts).unwrap();
    let trained = |name: &str, loss_on: &str| {
        check(&dir.0, &[name, "--loss-on", loss_on])["trained_tokens"].clone()
    };
    assert_eq!(trained("whole.jsonl", "auto"), trained("whole.jsonl", "all"));
    assert_eq!(trained("parts.jsonl", "auto"), trained("parts.jsonl", "assistant"));
    assert_ne!(trained("whole.jsonl", "auto"), trained("parts.jsonl", "auto"));
}
