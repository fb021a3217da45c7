//! Preference rows in all their forms, and rows that call tools: what is trained, and what evaluation
//! asks.

use std::{fs, path::Path};

use serde_json::{Value, json};
use tunesmith::{
    data::{
        Encoder, Example, LossOn, Row, RowError, kind_name, parse_rows, questions, wrong_kinds,
    },
    text::{ChatTemplate, Tokenizer},
};

const BUNDLED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-kitchen");

#[test]
fn all_forms_of_a_preference_mean_the_same() {
    let question = json!({"role": "user", "content": "Capital of France?"});
    let [paris, lyon] = ["Paris", "Lyon"].map(|city| json!({"role": "assistant", "content": city}));
    let openai = json!({"input": {"messages": [question], "tools": [], "parallel_tool_calls": true},
        "preferred_output": [paris], "non_preferred_output": [lyon]});
    let completions = json!({"input": {"messages": [question]},
        "preferred_completion": [paris], "non_preferred_completion": [lyon]});
    let trl = json!({"prompt": [question], "chosen": [paris], "rejected": [lyon]});
    let implicit = json!({"chosen": [question, paris], "rejected": [question, lyon]});
    let bodies = [openai, completions, trl, implicit].map(|row| only_row(&row).body);
    assert!(bodies.iter().all(|body| *body == bodies[0]), "{bodies:#?}");

    let model = Model::load(Path::new(BUNDLED));
    let example = model.encode_one(&Row { line: 1, body: bodies[0].clone(), is_completion: false });
    let rejected = example.rejected.as_deref().unwrap();
    assert_eq!(model.trained(&example), ["Paris<|im_end|>"]);
    assert_eq!(model.trained(rejected), ["Lyon<|im_end|>"]);
    let prompt = example.loss_mask.iter().position(|trained| *trained).unwrap();
    assert_eq!(example.tokens[..prompt], rejected.tokens[..prompt]);
    let both = example.tokens.len() + rejected.tokens.len();
    assert_eq!((example.num_tokens(), example.sides().count()), (both, 2));
}

#[test]
fn raw_preferences_are_texts_without_a_template() {
    let row = only_row(&json!({"prompt": "2+2=", "chosen": " 4", "rejected": " 5"}));
    let model = Model::load(Path::new(BUNDLED));
    let example = model.encode_one(&row);
    assert_eq!(model.trained(&example), [" 4<|im_end|>"]);
    assert_eq!(model.trained(example.rejected.as_deref().unwrap()), [" 5<|im_end|>"]);
    let question = &questions(&[row])[0];
    assert_eq!((question.raw_prompt.as_deref(), question.answer.as_str()), (Some("2+2="), " 4"));
}

#[test]
fn an_evaluation_expects_the_preferred_answer() {
    let row = only_row(&preference("Capital?", "Paris", "Lyon"));
    let question = &questions(&[row])[0];
    assert_eq!(question.answer, "Paris");
    assert_eq!(question.messages, [json!({"role": "user", "content": "Capital?"})]);
}

#[test]
fn what_was_said_before_is_never_trained_and_weights_do_not_matter() {
    let row = only_row(&json!({"input": {"messages": [
            {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1},
            {"role": "user", "content": "c"}]},
        "preferred_output": [{"role": "assistant", "content": "d", "weight": 0}],
        "non_preferred_output": [{"role": "assistant", "content": "e"}]}));
    let model = Model::load(Path::new(BUNDLED));
    let example = model.encode_one(&row);
    assert_eq!(model.trained(&example), ["d<|im_end|>"]);
}

#[test]
fn a_side_that_cannot_be_trained_is_named() {
    let row = only_row(&preference(&"word ".repeat(40), "yes", "no"));
    let model = Model::load(Path::new(BUNDLED));
    let errors = model.errors(&row, 20);
    assert_eq!(errors[0].code, "no_trained_tokens");
    assert!(errors[0].message.starts_with("preferred answer: "), "{}", errors[0].message);
}

#[test]
fn rows_of_the_wrong_kind_are_errors_of_their_lines() {
    let chat = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]});
    let raw = json!({"prompt": "a", "completion": "b"});
    let file = format!("{chat}\n{}\n{raw}\n", preference("a", "b", "c"));
    let (rows, errors) = parse_rows(file.as_bytes());
    assert_eq!(errors, []);
    assert_eq!(kind_name(&rows), "mixed");
    assert_eq!(
        [&rows[..1], &rows[1..2], &rows[2..]].map(kind_name),
        ["chat", "preference", "prompt_completion"]
    );
    let lines = |errors: Vec<RowError>| errors.iter().map(|e| (e.line, e.code)).collect::<Vec<_>>();
    assert_eq!(lines(wrong_kinds(&rows, false)), [(2, "wrong_row_kind")]);
    assert_eq!(lines(wrong_kinds(&rows, true)), [(1, "wrong_row_kind"), (3, "wrong_row_kind")]);
}

#[test]
fn the_bundled_model_trains_calls_and_answers_of_tools() {
    let model = Model::load(Path::new(BUNDLED));
    let calls = json!([call("a", "{\"city\":\"Rome\"}"), call("b", "{\"city\":\"Oslo\"}")]);
    let row = only_row(&json!({"messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "Weather?", "name": "ann"},
            {"role": "assistant", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "a", "content": "sunny"},
            {"role": "tool", "tool_call_id": "b", "content": "snow"},
            {"role": "assistant", "content": "Sunny and snow."}],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}],
        "parallel_tool_calls": true}));
    let example = model.encode_one(&row);
    let call = |city: &str| {
        format!(
            "<tool_call>\n{{\"name\": \"weather\", \"arguments\": {{\"city\": \"{city}\"}}}}\n</tool_call>"
        )
    };
    let calls = format!("{}\n{}<|im_end|>", call("Rome"), call("Oslo"));
    assert_eq!(model.trained(&example), [calls.as_str(), "Sunny and snow.<|im_end|>"]);
    let text = model.tokenizer.decode(&example.tokens, false).unwrap();
    for part in [
        "<|im_start|>system\nBe brief.\n\n# Tools",
        "{\"type\": \"function\", \"function\": {\"name\": \"weather\", \"parameters\": {}}}\n</tools>",
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\nsnow\n</tool_response><|im_end|>\n",
    ] {
        assert!(text.contains(part), "{part:?} is missing in\n{text}");
    }
    assert_eq!(text.matches("Be brief.").count(), 1);
}

#[test]
fn the_bundled_models_plain_chats_are_rendered_as_it_learned_them() {
    let model = Model::load(Path::new(BUNDLED));
    let row = only_row(&json!({"messages": [{"role": "system", "content": " s"},
        {"role": "user", "content": "a\n"}, {"role": "assistant", "content": "b"}]}));
    let text = model.tokenizer.decode(&model.encode_one(&row).tokens, false).unwrap();
    let expected = "<|im_start|>system\n s<|im_end|>\n<|im_start|>user\na\n<|im_end|>\n\
        <|im_start|>assistant\nb<|im_end|>\n";
    assert_eq!(text, expected);
    // What `tunesmith bundle` would write again.
    let source = include_str!("../../src/text/chatml_tools.jinja");
    assert_eq!(model.template.source(), source.trim_end());
}

#[test]
fn an_old_function_call_is_trained_as_a_tool_call() {
    let model = Model::load(Path::new(BUNDLED));
    let row = only_row(&json!({"messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "function_call": {"name": "weather", "arguments": "{}"}},
            {"role": "function", "name": "weather", "content": "sunny"},
            {"role": "assistant", "content": "Sunny."}],
        "functions": [{"name": "weather", "parameters": {}}]}));
    let trained = model.trained(&model.encode_one(&row));
    let call = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {}}\n</tool_call><|im_end|>";
    assert_eq!(trained, [call, "Sunny.<|im_end|>"]);
}

#[test]
fn a_template_that_drops_a_call_is_an_error_and_not_a_row_about_nothing() {
    let dir = std::env::temp_dir().join(format!("tunesmith-dropped-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    fs::copy(Path::new(BUNDLED).join("tokenizer.json"), dir.join("tokenizer.json")).unwrap();
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n\
        {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    fs::write(dir.join("chat_template.jinja"), template).unwrap();
    let model = Model::load(&dir);
    let row = only_row(&json!({"messages": [{"role": "user", "content": "Weather?"},
        {"role": "assistant", "tool_calls": [call("a", "{}")]}]}));
    let errors = model.errors(&row, 4096);
    assert_eq!((errors[0].line, errors[0].code), (1, "tool_calls_dropped"));
    assert!(errors[0].message.contains("\"weather\""), "{}", errors[0].message);
    fs::remove_dir_all(&dir).unwrap();
}

fn preference(question: &str, better: &str, worse: &str) -> Value {
    json!({"input": {"messages": [{"role": "user", "content": question}]},
        "preferred_output": [{"role": "assistant", "content": better}],
        "non_preferred_output": [{"role": "assistant", "content": worse}]})
}

fn call(id: &str, arguments: &str) -> Value {
    json!({"id": id, "type": "function", "function": {"name": "weather", "arguments": arguments}})
}

fn only_row(row: &Value) -> Row {
    let (mut rows, errors) = parse_rows(row.to_string().as_bytes());
    assert_eq!(errors, []);
    rows.pop().unwrap()
}

struct Model {
    tokenizer: Tokenizer,
    template: ChatTemplate,
}

impl Model {
    fn load(dir: &Path) -> Self {
        let tokenizer = Tokenizer::from_dir(dir).unwrap();
        Self { tokenizer, template: ChatTemplate::from_dir(dir).unwrap() }
    }

    fn encode(&self, row: &Row, max_length: usize) -> (Vec<Example>, Vec<RowError>) {
        let Self { tokenizer, template } = self;
        let encoder = Encoder { tokenizer, template, loss_on: LossOn::Assistant, max_length };
        encoder.encode_valid(std::slice::from_ref(row))
    }

    fn encode_one(&self, row: &Row) -> Example {
        let (mut examples, errors) = self.encode(row, 4096);
        assert_eq!((examples.len(), errors), (1, vec![]));
        examples.pop().unwrap()
    }

    fn errors(&self, row: &Row, max_length: usize) -> Vec<RowError> {
        let (examples, errors) = self.encode(row, max_length);
        assert_eq!(examples, []);
        errors
    }

    /// The text of every unbroken run of trained tokens.
    fn trained(&self, example: &Example) -> Vec<String> {
        let masked: Vec<(u32, bool)> =
            example.tokens.iter().copied().zip(example.loss_mask.iter().copied()).collect();
        let runs = masked.chunk_by(|one, next| one.1 == next.1).filter(|run| run[0].1);
        let decode = |run: &[(u32, bool)]| {
            let ids: Vec<u32> = run.iter().map(|(id, _)| *id).collect();
            self.tokenizer.decode(&ids, false).unwrap()
        };
        runs.map(decode).collect()
    }
}
