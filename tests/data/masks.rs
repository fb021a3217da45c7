//! Rows in, tokens and loss masks out: what is trained, and in which context.

use std::{
    fs,
    path::{Path, PathBuf},
};

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use tunesmith::{
    data::{DataError, Encoder, Example, LossOn, RowBody, RowError, RowStats, parse_rows},
    text::{ChatTemplate, Tokenizer},
};

const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tiny-llama");

/// `ChatML`, but an earlier assistant turn is rendered without its thoughts.
const FORGETS_THOUGHTS: &str = "{% for m in messages %}{% set text = m['content'] %}\
    {% if not loop.last and '</think>' in text %}{% set text = text.split('</think>')[-1] %}{% endif %}\
    {{ '<|im_start|>' + m['role'] + '\n' + text + '<|im_end|>\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// The generation prompt opens a thought that the rendering of an answer does not have.
const OPENS_A_THOUGHT: &str = "{% for m in messages %}\
    {{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}";

#[test]
fn an_answer_is_trained_with_its_end_of_turn_and_not_the_newline_after_it() {
    let model = Model::fixture();
    let examples = model.encode(&chat(&[("user", "Capital?"), ("assistant", "Paris")]));
    assert_eq!(model.trained(&examples[0]), ["Paris<|im_end|>"]);
    assert!(model.text(&examples[0]).ends_with("Paris<|im_end|>\n"));
}

#[test]
fn the_context_of_an_answer_is_what_the_server_tokenizes_even_where_tokens_would_merge() {
    let model = Model::fixture();
    // The newline of the generation prompt and the answer's own would be one token together.
    let examples = model.encode(&chat(&[("user", "Go on."), ("assistant", "\n\n  then")]));
    let prompt = model.prompt(&[json!({"role": "user", "content": "Go on."})]);
    let Example { tokens, loss_mask, .. } = &examples[0];
    assert_eq!(tokens[..prompt.len()], prompt);
    assert_eq!(loss_mask.iter().position(|trained| *trained), Some(prompt.len()));
    assert_eq!(model.trained(&examples[0]), ["\n\n  then<|im_end|>"]);
}

#[test]
fn every_assistant_turn_is_trained_but_those_of_weight_zero() {
    let model = Model::fixture();
    let row = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"one"},{"role":"user","content":"b"},
        {"role":"assistant","content":"two","weight":0},{"role":"user","content":"c"},{"role":"assistant","content":"three","weight":1}]}"#;
    let examples = model.encode(row);
    assert_eq!(model.trained(&examples[0]), ["one<|im_end|>", "three<|im_end|>"]);
}

#[test]
fn an_answer_to_nothing_is_context() {
    let model = Model::fixture();
    let greeting = [("assistant", "Hello!"), ("user", "Hi"), ("assistant", "How are you?")];
    let examples = model.encode(&chat(&greeting));
    assert_eq!(model.trained(&examples[0]), ["How are you?<|im_end|>"]);
    let errors = model.errors(&chat(&greeting[..1]));
    assert_eq!((errors[0].line, errors[0].code), (1, "no_trained_tokens"));
}

#[test]
fn a_completion_is_trained_with_one_end_of_sequence_token() {
    let model = Model::fixture();
    let row = |completion| json!({"prompt": "2+2=", "completion": completion}).to_string();
    for completion in [" 4", " 4<|im_end|>"] {
        let examples = model.encode(&row(completion));
        assert_eq!(model.text(&examples[0]), "2+2= 4<|im_end|>");
        assert_eq!(model.trained(&examples[0]), [" 4<|im_end|>"]);
    }
}

#[test]
fn a_completion_without_a_prompt_trains_all_but_its_first_token() {
    let model = Model::fixture();
    let examples = model.encode(&json!({"prompt": "", "completion": "a b c"}).to_string());
    let Example { tokens, loss_mask, .. } = &examples[0];
    assert!(!loss_mask[0]);
    assert_eq!(examples[0].num_trained(), tokens.len() - 1);
}

#[test]
fn loss_on_all_trains_every_token_but_the_first() {
    let model = Model { loss_on: LossOn::All, ..Model::fixture() };
    let row = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","weight":0}]}"#;
    let examples = model.encode(row);
    let Example { tokens, loss_mask, .. } = &examples[0];
    assert!(!loss_mask[0] && loss_mask[1..].iter().all(|trained| *trained));
    assert_eq!(loss_mask.len(), tokens.len());
}

#[test]
fn a_row_too_long_keeps_its_start_and_counts_what_it_lost() {
    let row = chat(&[("user", "Count."), ("assistant", "one two three four five six")]);
    let whole = Model::fixture().encode(&row).remove(0);
    let max_length = whole.tokens.len() - 5;
    let cut = Model { max_length, ..Model::fixture() }.encode(&row).remove(0);
    assert_eq!(cut.tokens, whole.tokens[..max_length]);
    assert_eq!(cut.loss_mask, whole.loss_mask[..max_length]);
    assert_eq!((cut.num_truncated, whole.num_truncated), (5, 0));
    let one_less = Model { max_length: whole.tokens.len() - 1, ..Model::fixture() }.encode(&row);
    let stats = RowStats::new(&[], &[one_less, vec![whole, cut]].concat());
    assert_eq!((stats.num_truncated_rows, stats.num_truncated_tokens), (2, 6));
}

#[test]
fn rows_without_a_trained_token_are_errors_that_name_their_lines() {
    let model = Model { max_length: 24, ..Model::fixture() };
    let weightless = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","weight":0}]}"#;
    let long = chat(&[("user", &"word ".repeat(40)), ("assistant", "b")]);
    let good = chat(&[("user", "a"), ("assistant", "b")]);
    let errors = model.errors(&format!("{good}\n{weightless}\n{good}\n{long}"));
    let found: Vec<_> = errors.iter().map(|error| (error.line, error.code)).collect();
    assert_eq!(found, [(2, "no_trained_tokens"), (4, "no_trained_tokens")]);
    assert!(errors[1].message.contains("maximum length is 24"), "{}", errors[1]);
}

#[test]
fn a_template_that_refuses_rows_gives_one_error_for_each() {
    let strict = "{% for m in messages %}{% if m['role'] == 'system' %}\
        {{ raise_exception('System role not supported') }}{% endif %}{{ m['content'] }}<|im_end|>{% endfor %}";
    let model = Model::with_template("strict", strict);
    let bad = chat(&[("system", "s"), ("user", "a"), ("assistant", "b")]);
    let good = chat(&[("user", "a"), ("assistant", "b")]);
    let errors = model.errors(&format!("{bad}\n{good}\n{bad}"));
    let found: Vec<_> = errors.iter().map(|error| (error.line, error.code)).collect();
    assert_eq!(found, [(1, "template_failed"), (3, "template_failed")]);
    assert!(errors[0].message.contains("System role not supported"), "{}", errors[0]);
}

#[test]
fn a_template_that_rewrites_history_gives_each_answer_the_context_it_is_served_in() {
    let model = Model::with_template("forgets", FORGETS_THOUGHTS);
    let turns =
        [("user", "a"), ("assistant", "<think>x</think>one"), ("user", "b"), ("assistant", "two")];
    let examples = model.encode(&chat(&turns));
    assert_eq!(examples.len(), 2);
    assert_eq!(model.trained(&examples[0]), ["<think>x</think>one<|im_end|>"]);
    assert_eq!(model.trained(&examples[1]), ["two<|im_end|>"]);
    assert!(model.text(&examples[1]).contains("assistant\none<|im_end|>"));
    assert_eq!((examples[0].line, examples[1].line), (1, 1));
}

#[test]
fn a_template_whose_answers_do_not_continue_its_prompts_is_refused_by_line() {
    let model = Model::with_template("opens", OPENS_A_THOUGHT);
    let errors = model.errors(&chat(&[("user", "a"), ("assistant", "b")]));
    assert_eq!((errors[0].line, errors[0].code), (1, "template_not_prefix"));
    assert!(errors[0].message.contains("message 2"), "{}", errors[0]);
}

#[test]
fn a_tokenizer_that_puts_a_space_before_each_text_does_not_put_one_before_the_answer() {
    let dir = model_dir("space");
    let file = dir.join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    tokenizer["normalizer"] = json!({"type": "Prepend", "prepend": " "});
    fs::write(&file, tokenizer.to_string()).unwrap();
    let model = Model::from_dir(&dir);
    fs::remove_dir_all(&dir).unwrap();

    let examples = model.encode(&chat(&[("user", "Capital?"), ("assistant", "Paris")]));
    let whole = "<|im_start|>user\nCapital?<|im_end|>\n<|im_start|>assistant\nParis<|im_end|>\n";
    assert_eq!(examples[0].tokens, model.tokenizer.encode(whole, false).unwrap());
    assert_eq!(model.trained(&examples[0]), ["Paris<|im_end|>"]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_conversation_is_whole_and_its_trained_parts_are_the_answers(
        system in proptest::option::of("[ -~é\n]{1,20}"),
        turns in proptest::collection::vec(("[ -~ü\n]{1,30}", "[!-~日本\n ]{1,30}", any::<bool>()), 1..5),
    ) {
        let model = Model::fixture();
        let mut messages: Vec<Value> =
            system.iter().map(|text| json!({"role": "system", "content": text})).collect();
        let mut answers = Vec::new();
        for (question, answer, counts) in &turns {
            messages.push(json!({"role": "user", "content": question}));
            if *counts {
                let context = model.prompt(&messages);
                answers.push((context, format!("{answer}<|im_end|>")));
            }
            messages.push(
                json!({"role": "assistant", "content": answer, "weight": u8::from(*counts)}));
        }
        prop_assume!(!answers.is_empty());

        let row = json!({"messages": messages}).to_string();
        let (rows, _) = parse_rows(row.as_bytes());
        let RowBody::Chat { messages, .. } = &rows[0].body else { panic!("chat expected") };
        let whole = model.template.render(messages, None, false, &Map::new()).unwrap();
        let example = model.encode(&row).remove(0);
        prop_assert_eq!(example.tokens.len(), example.loss_mask.len());
        prop_assert_eq!(model.text(&example), whole);
        let expected: Vec<_> = answers.iter().map(|(_, answer)| answer.clone()).collect();
        prop_assert_eq!(model.trained(&example), expected);
        // The first trained answer stands in exactly the context that a server would build.
        let (context, _) = &answers[0];
        prop_assert_eq!(&example.tokens[..context.len()], &context[..]);
        prop_assert!(!example.loss_mask[..context.len()].iter().any(|trained| *trained));
    }
}

/// A tokenizer and a template, and how to encode with them.
struct Model {
    tokenizer: Tokenizer,
    template: ChatTemplate,
    loss_on: LossOn,
    max_length: usize,
}

impl Model {
    fn fixture() -> Self {
        Self::from_dir(Path::new(FIXTURE))
    }

    fn with_template(name: &str, template: &str) -> Self {
        let dir = model_dir(name);
        fs::write(dir.join("chat_template.jinja"), template).unwrap();
        let model = Self::from_dir(&dir);
        fs::remove_dir_all(&dir).unwrap();
        model
    }

    fn from_dir(dir: &Path) -> Self {
        Self {
            tokenizer: Tokenizer::from_dir(dir).unwrap(),
            template: ChatTemplate::from_dir(dir).unwrap(),
            loss_on: LossOn::Assistant,
            max_length: 4096,
        }
    }

    fn result(&self, file: &str) -> Result<Vec<Example>, DataError> {
        let lines: Vec<String> = file.split("\n{").map(|line| line.replace('\n', " ")).collect();
        let (rows, errors) = parse_rows(lines.join("\n{").as_bytes());
        assert_eq!(errors, vec![]);
        let Self { tokenizer, template, loss_on, max_length } = self;
        let encoder = Encoder { tokenizer, template, loss_on: *loss_on, max_length: *max_length };
        encoder.encode_all(Path::new("rows.jsonl"), &rows)
    }

    fn encode(&self, file: &str) -> Vec<Example> {
        self.result(file).unwrap()
    }

    fn errors(&self, file: &str) -> Vec<RowError> {
        match self.result(file) {
            Err(DataError::Rows { errors, .. }) => errors,
            other => panic!("problems of rows expected, not {other:?}"),
        }
    }

    /// The tokens that a server continues for `messages`.
    fn prompt(&self, messages: &[Value]) -> Vec<u32> {
        let messages: Vec<Value> = messages
            .iter()
            .map(|message| json!({"role": message["role"], "content": message["content"]}))
            .collect();
        let text = self.template.render(&messages, None, true, &Map::new()).unwrap();
        self.tokenizer.encode(&text, false).unwrap()
    }

    fn text(&self, example: &Example) -> String {
        self.tokenizer.decode(&example.tokens, false).unwrap()
    }

    fn trained(&self, example: &Example) -> Vec<String> {
        crate::trained(&self.tokenizer, example)
    }
}

fn model_dir(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("tunesmith-mask-{name}-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(Path::new(FIXTURE).join(file), dir.join(file)).unwrap();
    }
    dir
}

fn chat(turns: &[(&str, &str)]) -> String {
    let messages: Vec<Value> =
        turns.iter().map(|(role, content)| json!({"role": role, "content": content})).collect();
    json!({"messages": messages}).to_string()
}
