//! Chat templates render what transformers renders.
//!
//! The expected texts were made by `fixtures/chat_templates/make.py`; the file names the versions.

#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, SystemTime},
};

use serde_json::{Map, Value, json};
use tunesmith::text::{ChatTemplate, TextError};

/// 2024-07-26 09:05:03 UTC, where make.py stops the clock.
const NOW: Duration = Duration::from_secs(1_721_984_703);

/// A model folder that lives as long as the test needs it.
struct ModelDir(PathBuf);

impl ModelDir {
    fn new(files: &[(&str, &str)]) -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!(
            "tunesmith-templates-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let dir = Self(std::env::temp_dir().join(name));
        for (name, text) in files {
            let path = dir.0.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    fn template(&self) -> Result<ChatTemplate, TextError> {
        ChatTemplate::from_dir(&self.0)
    }
}

impl Drop for ModelDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn fixture(name: &str) -> String {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/chat_templates");
    fs::read_to_string(dir.join(name)).unwrap()
}

fn fixture_json(name: &str) -> Value {
    serde_json::from_str(&fixture(name)).unwrap()
}

fn template_with(source: &str, special_tokens: &Value) -> Result<ChatTemplate, TextError> {
    let config = special_tokens.to_string();
    let dir = ModelDir::new(&[("chat_template.jinja", source), ("tokenizer_config.json", &config)]);
    Ok(dir.template()?.at(SystemTime::UNIX_EPOCH + NOW))
}

fn render(
    template: &ChatTemplate,
    conversation: &Value,
    add_generation_prompt: bool,
) -> Result<String, TextError> {
    let messages = conversation["messages"].as_array().unwrap();
    let tools = conversation["tools"].as_array().map(Vec::as_slice);
    let extra = conversation["extra"].as_object().cloned().unwrap_or_default();
    template.render(messages, tools, add_generation_prompt, &extra)
}

/// What differs from the expected outcome, if anything does.
fn mismatch(case: &Value, got: &Result<String, TextError>) -> Option<String> {
    let is_same = match (got, &case["text"], &case["refused"]) {
        (Ok(text), Value::String(expected), _) => text == expected,
        (Err(TextError::TemplateRefused { message }), _, Value::String(expected)) => {
            message == expected
        }
        (
            Err(TextError::TemplateFailed { .. } | TextError::TemplateSyntax { .. }),
            Value::Null,
            Value::Null,
        ) => case["fails"].is_string(),
        _ => false,
    };
    (!is_same).then(|| format!("expected {case}\n     got {got:?}\n"))
}

#[test]
fn every_template_renders_every_conversation_as_transformers_does() {
    let expected = fixture_json("expected.json");
    let conversations = fixture_json("conversations.json");
    let mut mismatches = Vec::new();
    for case in expected["cases"].as_array().unwrap() {
        let source = fixture(&format!("templates/{}", case["template"].as_str().unwrap()));
        let template = template_with(&source, &expected["special_tokens"]).unwrap();
        let conversation = &conversations[case["conversation"].as_str().unwrap()];
        let add = case["add_generation_prompt"].as_bool().unwrap();
        mismatches.extend(mismatch(case, &render(&template, conversation, add)));
    }
    assert!(mismatches.is_empty(), "{}", mismatches.join("\n"));
}

#[test]
fn every_corner_of_the_language_behaves_as_in_jinja2() {
    let expected = fixture_json("expected.json");
    let conversation = &fixture_json("conversations.json")["system"];
    let mut mismatches = Vec::new();
    for case in expected["expressions"].as_array().unwrap() {
        let source = case["expression"].as_str().unwrap();
        let got = template_with(source, &expected["special_tokens"])
            .and_then(|template| render(&template, conversation, false));
        mismatches.extend(mismatch(case, &got));
    }
    assert!(mismatches.is_empty(), "{}", mismatches.join("\n"));
}

/// Renders one user message "hi".
fn say_hi(template: &ChatTemplate) -> Result<String, TextError> {
    template.render(&[json!({"role": "user", "content": "hi"})], None, false, &Map::new())
}

#[test]
fn the_template_file_wins_over_the_tokenizer_configuration() {
    let config = json!({"chat_template": "from the configuration"}).to_string();
    let dir = ModelDir::new(&[("tokenizer_config.json", &config)]);
    assert_eq!(say_hi(&dir.template().unwrap()).unwrap(), "from the configuration");
    let dir = ModelDir::new(&[
        ("tokenizer_config.json", &config),
        ("chat_template.jinja", "from the file"),
    ]);
    let template = dir.template().unwrap();
    assert_eq!(say_hi(&template).unwrap(), "from the file");
    assert_eq!(template.source(), "from the file");
}

#[test]
fn tools_choose_the_template_for_tools() {
    let list = json!({"chat_template": [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools | length }} tools"},
        {"name": "rag", "template": "{% broken, but never used"},
    ]});
    let from_list = ModelDir::new(&[("tokenizer_config.json", &list.to_string())]);
    let from_files = ModelDir::new(&[
        ("chat_template.jinja", "plain"),
        ("additional_chat_templates/tool_use.jinja", "{{ tools | length }} tools"),
    ]);
    for dir in [from_list, from_files] {
        let template = dir.template().unwrap();
        assert_eq!(say_hi(&template).unwrap(), "plain");
        let messages = [json!({"role": "user", "content": "hi"})];
        let tools = [json!({"type": "function"})];
        assert_eq!(
            template.render(&messages, Some(&tools), false, &Map::new()).unwrap(),
            "1 tools"
        );
    }
}

#[test]
fn a_model_without_a_template_speaks_chatml() {
    let dir = ModelDir::new(&[("tokenizer_config.json", "{}")]);
    let messages = [json!({"role": "user", "content": "hi"})];
    assert_eq!(
        dir.template().unwrap().render(&messages, None, true, &Map::new()).unwrap(),
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    );
}

#[test]
fn special_tokens_come_as_strings_objects_or_from_their_own_file() {
    let config = json!({"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": null});
    let map = json!({"bos_token": "ignored", "eos_token": "ignored", "pad_token": "<pad>"});
    let dir = ModelDir::new(&[
        ("chat_template.jinja", "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}"),
        ("tokenizer_config.json", &config.to_string()),
        ("special_tokens_map.json", &map.to_string()),
    ]);
    assert_eq!(say_hi(&dir.template().unwrap()).unwrap(), "<s>||<pad>");
}

#[test]
fn a_broken_file_is_an_error_that_names_it_and_the_line() {
    let cases = [
        ("chat_template.jinja", "a\n{% if x %}\nb", "chat_template.jinja, line 3: syntax error"),
        ("chat_template.jinja", "a\n{{ 1 + }}", "chat_template.jinja, line 2: syntax error"),
        ("tokenizer_config.json", "{\"chat_template\": \"{{\"}", "tokenizer_config.json, line 1"),
        ("tokenizer_config.json", "{\"chat_template\": 5}", "tokenizer_config.json: chat_template"),
        ("tokenizer_config.json", "{\"chat_template\": []}", "without a \"default\""),
        ("tokenizer_config.json", "{\"chat_template\": ", "tokenizer_config.json: EOF"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json: invalid type"),
        ("special_tokens_map.json", "nonsense", "special_tokens_map.json: expected"),
    ];
    for (name, text, expected) in cases {
        let message = ModelDir::new(&[(name, text)]).template().err().unwrap().to_string();
        assert!(message.contains(expected), "{message:?} does not contain {expected:?}");
    }
    let dir = ModelDir::new(&[]);
    fs::create_dir_all(&dir.0).unwrap();
    fs::write(dir.0.join("chat_template.jinja"), [b'a', 0xff]).unwrap();
    let message = dir.template().err().unwrap().to_string();
    assert!(message.contains("chat_template.jinja: "), "{message}");
}

#[test]
fn a_failure_while_rendering_names_the_line() {
    let template = template_with("a\n{{ messages[0].nothing.more }}", &json!({})).unwrap();
    assert_eq!(
        say_hi(&template).unwrap_err().to_string(),
        "the chat template failed at chat_template.jinja, line 2: undefined value"
    );
}

#[test]
fn what_no_template_can_render_is_refused_before_rendering() {
    let template = template_with("x", &json!({"bos_token": "<s>"})).unwrap();
    let render = |messages: &[Value], extra: Value| {
        template.render(messages, None, false, extra.as_object().unwrap())
    };
    let message = json!({"role": "user", "content": "hi"});
    assert!(matches!(render(&[], json!({})), Err(TextError::NoMessages)));
    assert!(matches!(
        render(&[message.clone(), json!("hi")], json!({})),
        Err(TextError::NotAMessage { index: 1 })
    ));
    for name in ["messages", "tools", "add_generation_prompt", "bos_token"] {
        assert!(matches!(
            render(std::slice::from_ref(&message), json!({name: 1})),
            Err(TextError::ReservedVariable { name: refused }) if refused == name
        ));
    }
}

#[test]
fn runaway_templates_end_with_an_error() {
    let nested = "(".repeat(100_000);
    let sources = [
        "{% for i in range(10000) %}{% for j in range(10000) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(s='ab') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(l=[]) %}{% for i in range(5000) %}{% set ns.l = [ns.l] %}{% endfor %}{{ ns.l | tojson }}",
        "{% set ns = namespace(l=['ab']) %}{% for i in range(28) %}{% set ns.l = ns.l + ns.l %}{% endfor %}{{ ns.l | tojson }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 'a\nb' | indent(300000000) }}",
        "{{ '%300000000d' | format(1) }}",
        "{{ [1] | tojson(indent=300000000) }}",
        "{{ 'a' * 300000000 }}",
        "{% include 'tokenizer_config.json' %}",
        "{{ ''.__class__.__mro__ }}",
        &format!("{{{{ {nested}1 }}}}"),
    ];
    for source in sources {
        let outcome = template_with(source, &json!({})).and_then(|template| say_hi(&template));
        assert!(
            matches!(
                outcome,
                Err(TextError::TemplateFailed { .. } | TextError::TemplateSyntax { .. })
            ),
            "{}: {:?}",
            &source[..source.len().min(100)],
            outcome.map(|text| text.len()),
        );
    }
}

#[test]
fn a_long_conversation_stays_far_from_the_limits() {
    let source = fixture("templates/qwen3.jinja");
    let template = template_with(&source, &json!({})).unwrap();
    let turn = |index: usize| {
        let role = if index.is_multiple_of(2) { "user" } else { "assistant" };
        json!({"role": role, "content": "word ".repeat(400)})
    };
    let messages: Vec<Value> = (0..2000).map(turn).collect();
    let text = template.render(&messages, None, true, &Map::new()).unwrap();
    assert!(text.len() > 2000 * 2000);
}
