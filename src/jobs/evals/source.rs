//! A run that is checked: where its rows come from, and who answers them.

use std::{collections::BTreeMap, fs, io::Read};

use serde_json::{Map, Value};

use super::{Eval, EvalRun, EvalSource, RunStatus, SourceRow, schema, valid_name};
use crate::eval::grader::{
    Context, Fault, FaultKind, Invalid, Messages, Path, Sampling, plain_messages,
};
use crate::jobs::{JobsError, Service, evals::records::Counts, valid_metadata};

/// Rows of one run.
const MAX_ROWS: usize = 10_000;
/// Bytes of a file of rows.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// OpenAI's default temperature of a run.
const DEFAULT_TEMPERATURE: f32 = 1.0;

/// A run without a mistake in it.
#[derive(Debug, Clone)]
pub struct NewRun {
    name: Option<String>,
    metadata: Option<BTreeMap<String, String>>,
    model: Option<String>,
    data_source: Value,
    rows: Vec<SourceRow>,
}

/// Who answers the rows.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Answers {
    /// Each row has its answer.
    Given,
    /// This model is asked.
    Model { model: String, prompt: Prompt, sampling: Sampling },
}

/// What a model is asked.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Prompt {
    /// Messages with variables in them.
    Template(Messages),
    /// A row's own messages.
    Item(Path),
}

impl NewRun {
    /// Checks the fields of a run of `eval`, and reads its rows.
    ///
    /// # Errors
    /// The first mistake, with its place.
    pub fn parse(service: &Service, eval: &Eval, fields: &Value) -> Result<Self, JobsError> {
        let source = &fields["data_source"];
        let answers = Answers::parse(source)?;
        let rows = rows(service, source)?;
        if !(1..=MAX_ROWS).contains(&rows.len()) {
            let message = format!("has {} rows; a run takes 1 to {MAX_ROWS}", rows.len());
            return Err(Invalid::new("data_source.source", message).into());
        }
        for (index, row) in rows.iter().enumerate() {
            check_row(eval, &answers, index, row)?;
        }
        let mut data_source = source.clone();
        if let Some(content) = data_source["source"].as_object_mut() {
            content.remove("content");
        }
        Ok(Self {
            name: valid_name(&fields["name"])?,
            metadata: valid_metadata(&fields["metadata"])?,
            model: match answers {
                Answers::Given => None,
                Answers::Model { model, .. } => Some(model),
            },
            data_source,
            rows,
        })
    }

    /// The model that is to answer.
    #[must_use]
    pub fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    pub(super) fn into_records(
        self,
        eval: &Eval,
        id: String,
        created_at: u64,
    ) -> (EvalRun, EvalSource) {
        let run = EvalRun {
            id: id.clone(),
            eval_id: eval.id.clone(),
            created_at,
            name: self.name,
            model: self.model,
            data_source: self.data_source,
            metadata: self.metadata,
            status: RunStatus::Queued,
            error: None,
            total: self.rows.len(),
            counts: Counts::default(),
            usage: Vec::new(),
            criteria: Vec::new(),
        };
        (run, EvalSource { run_id: id, rows: self.rows })
    }
}

impl Answers {
    /// Reads a data source, but for its rows.
    pub(super) fn parse(source: &Value) -> Result<Self, Invalid> {
        let place = |field: &str| format!("data_source.{field}");
        match source["type"].as_str() {
            Some("jsonl") => return Ok(Self::Given),
            Some("completions") => {}
            Some("responses") => {
                let message = "`responses` is not supported by this server: use `completions`";
                return Err(Invalid::new(place("type"), message));
            }
            Some(other) => {
                let message = format!("unknown type `{other}`: expected `completions` or `jsonl`");
                return Err(Invalid::new(place("type"), message));
            }
            None => return Err(Invalid::new(place("type"), "is required")),
        }
        let model = source["model"].as_str().filter(|model| !model.is_empty());
        let model = model.ok_or_else(|| Invalid::new(place("model"), "is required"))?.to_owned();
        let input = &source["input_messages"];
        let prompt = match input["type"].as_str() {
            Some("template") => {
                let param = place("input_messages.template");
                Prompt::Template(Messages::parse(&input["template"], &param)?)
            }
            Some("item_reference") => {
                let param = place("input_messages.item_reference");
                let name = input["item_reference"].as_str().unwrap_or_default();
                let path = Path::parse(name).map_err(|message| Invalid::new(param, message))?;
                Prompt::Item(path)
            }
            _ => {
                let message = "is required: `template` or `item_reference`";
                return Err(Invalid::new(place("input_messages.type"), message));
            }
        };
        let params = place("sampling_params");
        let sampling = Sampling::parse(&source["sampling_params"], &params, DEFAULT_TEMPERATURE)?;
        Ok(Self::Model { model, prompt, sampling })
    }
}

impl Prompt {
    /// What the model is asked about `item`.
    pub(super) fn messages(&self, item: &Value) -> Result<Vec<Value>, Fault> {
        let context = Context { item: item.clone(), sample: Value::Null };
        match self {
            Self::Template(messages) => messages.render(&context),
            Self::Item(path) => plain_messages(path.find(&context)?)
                .map_err(|what| Fault::new(FaultKind::InvalidVariable, what)),
        }
    }
}

fn rows(service: &Service, source: &Value) -> Result<Vec<SourceRow>, JobsError> {
    let content = &source["source"];
    match content["type"].as_str() {
        Some("file_content") => {
            let param = "data_source.source.content";
            let list = content["content"].as_array();
            let list = list.ok_or_else(|| Invalid::new(param, "must be a list of rows"))?;
            let numbered = list.iter().enumerate();
            numbered.map(|(index, row)| read_row(row, &format!("{param}[{index}]"))).collect()
        }
        Some("file_id") => {
            let param = "data_source.source.id";
            let id = content["id"].as_str();
            file_rows(service, id.ok_or_else(|| Invalid::new(param, "is required"))?)
        }
        Some(other @ ("stored_completions" | "responses" | "logs")) => {
            let message =
                format!("`{other}` is not supported by this server, which keeps no requests");
            Err(Invalid::new("data_source.source.type", message).into())
        }
        _ => {
            let message = "is required: `file_content` or `file_id`";
            Err(Invalid::new("data_source.source.type", message).into())
        }
    }
}

fn file_rows(service: &Service, id: &str) -> Result<Vec<SourceRow>, JobsError> {
    const PARAM: &str = "data_source.source.id";
    let file = service.file(id, PARAM)?;
    if !["evals", "fine-tune"].contains(&file.purpose.as_str()) {
        let message = format!("the file's purpose is `{}`: evals or fine-tune", file.purpose);
        return Err(Invalid::new(PARAM, message).into());
    }
    if file.bytes > MAX_FILE_BYTES {
        let message =
            format!("the file has {} bytes; a run takes {MAX_FILE_BYTES} at most", file.bytes);
        return Err(Invalid::new(PARAM, message).into());
    }
    let path = service.blob_path(&file);
    let failed = |source| JobsError::file(&path, source);
    let mut text = String::new();
    fs::File::open(&path).map_err(failed)?.read_to_string(&mut text).map_err(failed)?;
    let mut rows = Vec::new();
    for (index, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let place = format!("{PARAM}: line {}", index + 1);
        let row: Value =
            serde_json::from_str(line).map_err(|error| Invalid::new(&place, error.to_string()))?;
        rows.push(read_row(&row, &place)?);
    }
    Ok(rows)
}

/// `{"item": …, "sample": …}`; a line without `item`, such as a training row, is itself the item.
fn read_row(row: &Value, param: &str) -> Result<SourceRow, JobsError> {
    let Value::Object(fields) = row else {
        return Err(Invalid::new(param, "must be an object with `item`").into());
    };
    let sample = fields.get("sample").filter(|sample| !sample.is_null()).cloned();
    match fields.get("item") {
        Some(item @ Value::Object(_)) => Ok(SourceRow { item: item.clone(), sample }),
        Some(_) => Err(Invalid::new(format!("{param}.item"), "must be an object").into()),
        None => {
            let mut item: Map<String, Value> = fields.clone();
            item.remove("sample");
            Ok(SourceRow { item: Value::Object(item), sample })
        }
    }
}

fn check_row(eval: &Eval, answers: &Answers, index: usize, row: &SourceRow) -> Result<(), Invalid> {
    let param = format!("data_source.source.content[{index}]");
    if let Some((place, message)) = schema::difference(&eval.item_schema, &row.item) {
        return Err(Invalid::new(format!("{param}.item{place}"), message));
    }
    let is_answer = |sample: &Value| sample.is_string() || sample.is_object();
    if *answers == Answers::Given && !row.sample.as_ref().is_none_or(is_answer) {
        return Err(Invalid::new(format!("{param}.sample"), "must be a text or an object"));
    }
    Ok(())
}
