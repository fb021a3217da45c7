//! A model's chat template: a conversation to the text the model was trained on.

use std::{collections::BTreeMap, path::Path, time::SystemTime};

use minijinja::{Environment, Error};
use serde_json::{Map, Value};

use crate::text::{
    TextError, ToolCallFormat,
    jinja::{RaisedByTemplate, environment, normalize, set_clock, to_template_value},
    special_tokens::{SpecialTokens, broken, read_json_object, read_special_tokens, read_text},
};

/// What the tokenizer of a model without a template is taken to speak.
const CHATML: &str = "{% for message in messages %}\
    {{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\
    {% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// Variables that the renderer sets itself.
const RESERVED: [&str; 3] = ["messages", "tools", "add_generation_prompt"];

/// Names under which a message may carry its reasoning; templates read the first.
const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A model's chat template (Jinja through minijinja).
pub struct ChatTemplate {
    env: Environment<'static>,
    special_tokens: SpecialTokens,
    default: Source,
    /// The template for conversations with tools, where the model has one of its own.
    tool_use: Option<Source>,
}

/// One template: the name by which errors and the environment know it, and its text.
#[derive(Clone)]
struct Source {
    name: String,
    text: String,
}

impl ChatTemplate {
    /// From `chat_template.jinja` (and `additional_chat_templates/tool_use.jinja`), else
    /// `chat_template` of tokenizer_config.json (a string, or a list with a template named "default"
    /// and perhaps one named "tool_use"), else ChatML with a warning.
    ///
    /// # Errors
    /// [`TextError::File`] where a file is broken, [`TextError::TemplateSyntax`] where a template is.
    pub fn from_dir(dir: &Path) -> Result<Self, TextError> {
        let special_tokens = read_special_tokens(dir)?;
        let (default, tool_use) = match read_sources(dir)? {
            Some(sources) => sources,
            None => {
                tracing::warn!(dir = %dir.display(), "no chat template found, ChatML is assumed");
                (Source { name: "ChatML".to_owned(), text: CHATML.to_owned() }, None)
            }
        };
        Self::new(default, tool_use, special_tokens)
    }

    fn new(
        default: Source,
        tool_use: Option<Source>,
        special_tokens: SpecialTokens,
    ) -> Result<Self, TextError> {
        let mut env = environment(SystemTime::now);
        for source in std::iter::once(&default).chain(&tool_use) {
            env.add_template_owned(source.name.clone(), normalize(&source.text))
                .map_err(|error| syntax_error(&source.name, &error))?;
        }
        Ok(Self { env, special_tokens, default, tool_use })
    }

    /// How this template's model writes tool calls; `None` where the template knows no tools.
    #[must_use]
    pub fn tool_call_format(&self) -> Option<ToolCallFormat> {
        ToolCallFormat::of_template(&self.tool_use.as_ref().unwrap_or(&self.default).text)
    }

    /// Stops the clock that the template's `strftime_now` reads.
    #[must_use]
    pub fn at(mut self, moment: SystemTime) -> Self {
        set_clock(&mut self.env, move || moment);
        self
    }

    /// Renders OpenAI-style message objects, exactly as transformers'
    /// `apply_chat_template(tokenize=False)`. `tools`: the OpenAI tool objects, if any. `extra`:
    /// further variables of the template. Before rendering, `arguments` strings of tool calls are
    /// parsed to objects, `null` fields of messages dropped, and a message's reasoning given the
    /// name that templates read.
    ///
    /// # Errors
    /// [`TextError::TemplateRefused`] with the template's own words where it calls
    /// `raise_exception`, [`TextError::TemplateFailed`] where it fails otherwise; an empty
    /// conversation, a message that is no object, or a reserved name in `extra`.
    pub fn render(
        &self,
        messages: &[Value],
        tools: Option<&[Value]>,
        add_generation_prompt: bool,
        extra: &Map<String, Value>,
    ) -> Result<String, TextError> {
        if messages.is_empty() {
            return Err(TextError::NoMessages);
        }
        let mut context: BTreeMap<&str, minijinja::Value> = BTreeMap::new();
        context.insert("documents", ().into());
        for (name, token) in &self.special_tokens {
            context.insert(name, token.as_str().into());
        }
        for (name, value) in extra {
            if RESERVED.contains(&name.as_str()) || self.special_tokens.contains_key(name) {
                return Err(TextError::ReservedVariable { name: name.clone() });
            }
            context.insert(name, to_template_value(value));
        }
        let messages = messages.iter().enumerate().map(|(index, message)| {
            let message = message.as_object().ok_or(TextError::NotAMessage { index })?;
            Ok(to_template_value(&normalize_message(message)))
        });
        context.insert("messages", messages.collect::<Result<Vec<_>, TextError>>()?.into());
        let tool_values =
            tools.map(|tools| tools.iter().map(to_template_value).collect::<Vec<_>>());
        context.insert("tools", tool_values.into());
        context.insert("add_generation_prompt", add_generation_prompt.into());

        let source = self.tool_use.as_ref().filter(|_| tools.is_some()).unwrap_or(&self.default);
        self.env
            .get_template(&source.name)
            .and_then(|template| template.render(minijinja::Value::from(context)))
            .map_err(|error| render_error(&source.name, &error))
    }

    /// The template's source text (the default one, where there are several).
    pub fn source(&self) -> &str {
        &self.default.text
    }
}

/// The default template of a model folder and the one for tools; `None` where it has no template.
fn read_sources(dir: &Path) -> Result<Option<(Source, Option<Source>)>, TextError> {
    let read = |name: &str| -> Result<Option<Source>, TextError> {
        let text = read_text(&dir.join(name))?;
        Ok(text.map(|text| Source { name: name.to_owned(), text }))
    };
    if let Some(default) = read("chat_template.jinja")? {
        return Ok(Some((default, read("additional_chat_templates/tool_use.jinja")?)));
    }
    let path = dir.join("tokenizer_config.json");
    let Some(config) = read_json_object(&path)? else { return Ok(None) };
    let name = "tokenizer_config.json".to_owned();
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some((Source { name, text: text.clone() }, None))),
        Some(Value::Array(list)) => {
            let named = |wanted: &str| {
                let entry = list.iter().find(|entry| entry["name"] == wanted)?;
                let text = entry["template"].as_str()?.to_owned();
                Some(Source { name: format!("tokenizer_config.json ({wanted})"), text })
            };
            let default = named("default")
                .ok_or_else(|| broken(&path, &"chat_template is a list without a \"default\""))?;
            Ok(Some((default, named("tool_use"))))
        }
        Some(_) => Err(broken(&path, &"chat_template is neither a string nor a list")),
    }
}

/// A message as templates expect it.
fn normalize_message(message: &Map<String, Value>) -> Value {
    let mut normal = Map::new();
    let mut reasoning = REASONING_FIELDS.iter().filter_map(|field| message.get(*field));
    let reasoning = reasoning.find(|value| !value.is_null());
    if let Some(reasoning) = reasoning {
        normal.insert("thinking".to_owned(), reasoning.clone());
    }
    // Many templates write "None" for a null field and handle a missing one.
    let fields = message.iter().filter(|(_, value)| !value.is_null());
    normal.extend(fields.map(|(name, value)| (name.clone(), value.clone())));
    if let Some(reasoning) = reasoning {
        normal.insert("reasoning_content".to_owned(), reasoning.clone());
    }
    if let Some(Value::Array(calls)) = normal.get_mut("tool_calls") {
        calls.iter_mut().for_each(parse_arguments);
    }
    Value::Object(normal)
}

/// OpenAI sends a call's arguments as a string of JSON; templates write `arguments | tojson`.
fn parse_arguments(call: &mut Value) {
    let Some(arguments) = call.pointer_mut("/function/arguments") else { return };
    if let Some(Ok(parsed @ Value::Object(_))) = arguments.as_str().map(serde_json::from_str) {
        *arguments = parsed;
    }
}

fn syntax_error(name: &str, error: &Error) -> TextError {
    TextError::TemplateSyntax {
        file: name.to_owned(),
        line: error.line().unwrap_or(1),
        reason: reason(error),
    }
}

fn render_error(name: &str, error: &Error) -> TextError {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(RaisedByTemplate(message)) = cause.downcast_ref() {
            return TextError::TemplateRefused { message: message.clone() };
        }
        source = cause.source();
    }
    TextError::TemplateFailed {
        file: error.name().unwrap_or(name).to_owned(),
        line: error.line().unwrap_or(1),
        reason: reason(error),
    }
}

/// What happened, without the place: the caller names it.
fn reason(error: &Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}
