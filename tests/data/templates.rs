//! What the templates of well-known model families make a conversation train.

use std::{fs, path::Path};

use crate::common::TempDir;
use serde_json::{Value, json};
use tunesmith::{
    data::{DataError, Encoder, Example, LossOn, Question, Row, parse_rows},
    text::{ChatTemplate, Tokenizer},
};

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");

/// Two questions, answered "one" and "two": template, end-of-turn token, what is trained.
const FAMILIES: &[(&str, &str, &[&str])] = &[
    ("chatml", "<|im_end|>", &["one<|im_end|>", "two<|im_end|>"]),
    ("smollm2", "<|im_end|>", &["one<|im_end|>", "two<|im_end|>"]),
    ("qwen2_5", "<|im_end|>", &["one<|im_end|>", "two<|im_end|>"]),
    ("llama3", "<|eot_id|>", &["one<|eot_id|>", "two<|eot_id|>"]),
    ("llama3_2", "<|eot_id|>", &["one<|eot_id|>", "two<|eot_id|>"]),
    ("gemma", "<end_of_turn>", &["one<end_of_turn>", "two<end_of_turn>"]),
    ("gemma3", "<end_of_turn>", &["one<end_of_turn>", "two<end_of_turn>"]),
    ("mistral_v03", "</s>", &[" one</s>", " two</s>"]),
    ("zephyr", "</s>", &["one</s>", "two</s>"]),
    // It closes every rendering with the end-of-sequence token, here the same one.
    ("phi3", "<|end|>", &["one<|end|>\n<|end|>", "two<|end|>\n<|end|>"]),
    ("hermes", "<|im_end|>", &["one<|im_end|>", "two<|im_end|>"]),
    (
        "command_r",
        "<|END_OF_TURN_TOKEN|>",
        &["one<|END_OF_TURN_TOKEN|>", "two<|END_OF_TURN_TOKEN|>"],
    ),
    // Its generation prompt ends before the newline.
    ("generation_blocks", "<|im_end|>", &["\none<|im_end|>", "\ntwo<|im_end|>"]),
    (
        "qwen3",
        "<|im_end|>",
        &["<think>\n\n</think>\n\none<|im_end|>", "<think>\n\n</think>\n\ntwo<|im_end|>"],
    ),
];

#[test]
fn every_familys_answers_are_trained_up_to_their_end_of_turn() {
    for (name, end_of_turn, expected) in FAMILIES {
        let model = Model::new(name, end_of_turn);
        let examples = model.encode(&[conversation()]).unwrap();
        let trained: Vec<String> =
            examples.iter().flat_map(|example| model.trained(example)).collect();
        assert_eq!(trained, *expected, "{name}");
    }
}

#[test]
fn what_an_evaluation_asks_is_what_training_showed() {
    let raw = json!({"prompt": "first, second, ", "completion": "third"});
    for (name, end_of_turn, _) in FAMILIES {
        let model = Model::new(name, end_of_turn);
        for row in [conversation(), raw.clone()] {
            let question = Question::new(&parse(std::slice::from_ref(&row))[0]).unwrap();
            let prompt = question.prompt_tokens(&model.tokenizer, &model.template).unwrap();
            let example = model.encode(&[row]).unwrap().pop().unwrap();
            assert_eq!(example.tokens[..prompt.len()], prompt, "{name}");
            let last_run = example.loss_mask[prompt.len()..].iter().take_while(|trained| **trained);
            assert!(last_run.count() >= 2, "{name}: the answer and its end are trained");
            assert!(!example.loss_mask[prompt.len() - 1], "{name}: the prompt is not");
        }
    }
}

#[test]
fn tool_calls_are_trained_as_the_template_writes_them() {
    let row = json!({
        "messages": [
            {"role": "user", "content": "Weather in Rome?"},
            {"role": "assistant", "content": null, "tool_calls": [{"id": "call00001", "type": "function",
                "function": {"name": "weather", "arguments": "{\"city\": \"Rome\"}"}}]},
            {"role": "tool", "tool_call_id": "call00001", "content": "sunny"},
            {"role": "assistant", "content": "Sunny."},
        ],
        "tools": [{"type": "function", "function": {"name": "weather", "description": "d",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}],
        "parallel_tool_calls": false,
    });
    let call = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\"}}\n</tool_call><|im_end|>";
    let model = Model::new("qwen2_5", "<|im_end|>");
    let examples = model.encode(&[row]).unwrap();
    assert_eq!(model.trained(&examples[0]), [call, "Sunny.<|im_end|>"]);
    let text = model.tokenizer.decode(&examples[0].tokens, false).unwrap();
    assert!(text.contains("# Tools") && text.contains("<tool_response>\nsunny"), "{text}");
}

#[test]
fn a_template_that_forces_a_thought_before_the_answer_is_refused() {
    let model = Model::new("deepseek_r1", "<|im_end|>");
    let Err(DataError::Rows { errors, .. }) = model.encode(&[conversation(), conversation()])
    else {
        panic!("problems of rows expected");
    };
    let found: Vec<_> = errors.iter().map(|error| (error.line, error.code)).collect();
    assert_eq!(found, [(1, "template_not_prefix"), (2, "template_not_prefix")]);
}

fn conversation() -> Value {
    json!({"messages": [
        {"role": "user", "content": "first?"}, {"role": "assistant", "content": "one"},
        {"role": "user", "content": "second?"}, {"role": "assistant", "content": "two"},
    ]})
}

/// The fixture's tokenizer with a family's template and end-of-turn token.
struct Model {
    tokenizer: Tokenizer,
    template: ChatTemplate,
}

impl Model {
    fn new(family: &str, end_of_turn: &str) -> Self {
        let dir = TempDir::new();
        let fixtures = Path::new(FIXTURES);
        let bytes = fs::read(fixtures.join("tiny-llama/tokenizer.json")).unwrap();
        let mut tokenizer: Value = serde_json::from_slice(&bytes).unwrap();
        let added = tokenizer["added_tokens"].as_array_mut().unwrap();
        if !added.iter().any(|token| token["content"] == end_of_turn) {
            let mut token = added[0].clone();
            token["id"] = json!(384);
            token["content"] = json!(end_of_turn);
            added.push(token);
        }
        fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let config = json!({"bos_token": "<|endoftext|>", "eos_token": end_of_turn});
        fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
        let template = format!("chat_templates/templates/{family}.jinja");
        fs::copy(fixtures.join(template), dir.join("chat_template.jinja")).unwrap();
        Self {
            tokenizer: Tokenizer::from_dir(&dir.0).unwrap(),
            template: ChatTemplate::from_dir(&dir.0).unwrap(),
        }
    }

    fn encode(&self, rows: &[Value]) -> Result<Vec<Example>, DataError> {
        let Self { tokenizer, template } = self;
        let encoder = Encoder { tokenizer, template, loss_on: LossOn::Assistant, max_length: 4096 };
        encoder.encode_all(Path::new("rows.jsonl"), &parse(rows))
    }

    fn trained(&self, example: &Example) -> Vec<String> {
        crate::trained(&self.tokenizer, example)
    }
}

fn parse(rows: &[Value]) -> Vec<Row> {
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    let (rows, errors) = parse_rows(lines.join("\n").as_bytes());
    assert_eq!(errors, vec![]);
    rows
}
