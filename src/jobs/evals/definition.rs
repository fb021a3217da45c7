//! A definition that is checked: what a row looks like, and the graders.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Eval, valid_name};
use crate::eval::grader::{Grader, Invalid};
use crate::jobs::{JobsError, valid_metadata};

/// Graders of one evaluation.
const MAX_CRITERIA: usize = 20;

/// A definition without a mistake in it.
#[derive(Debug, Clone)]
pub struct NewEval {
    name: Option<String>,
    item_schema: Value,
    include_sample_schema: bool,
    testing_criteria: Vec<Value>,
    metadata: Option<BTreeMap<String, String>>,
    graders: Vec<Grader>,
}

impl NewEval {
    /// Checks the fields of a definition.
    ///
    /// # Errors
    /// The first mistake, with its place.
    pub fn parse(fields: &Value) -> Result<Self, JobsError> {
        let config = &fields["data_source_config"];
        let place = |field: &str| format!("data_source_config.{field}");
        match config["type"].as_str() {
            Some("custom") => {}
            Some(other @ ("logs" | "stored_completions")) => {
                let message =
                    format!("`{other}` is not supported by this server, which keeps no requests");
                return Err(Invalid::new(place("type"), message).into());
            }
            Some(other) => {
                let message = format!("unknown type `{other}`: expected `custom`");
                return Err(Invalid::new(place("type"), message).into());
            }
            None => return Err(Invalid::new(place("type"), "is required").into()),
        }
        if !config["item_schema"].is_object() {
            return Err(Invalid::new(place("item_schema"), "must be a JSON schema").into());
        }
        let include_sample_schema = &config["include_sample_schema"];
        if !include_sample_schema.is_boolean() && !include_sample_schema.is_null() {
            return Err(Invalid::new(place("include_sample_schema"), "is no boolean").into());
        }
        let include_sample_schema = include_sample_schema.as_bool().unwrap_or(false);
        let testing_criteria = fields["testing_criteria"].as_array().cloned().unwrap_or_default();
        if !(1..=MAX_CRITERIA).contains(&testing_criteria.len()) {
            let message = format!("must be a list of 1 to {MAX_CRITERIA} graders");
            return Err(Invalid::new("testing_criteria", message).into());
        }
        Ok(Self {
            name: valid_name(&fields["name"])?,
            item_schema: config["item_schema"].clone(),
            include_sample_schema,
            graders: graders(&testing_criteria)?,
            testing_criteria,
            metadata: valid_metadata(&fields["metadata"])?,
        })
    }

    /// Its graders.
    #[must_use]
    pub fn graders(&self) -> &[Grader] {
        &self.graders
    }

    pub(super) fn into_record(self, id: String, created_at: u64) -> Eval {
        Eval {
            id,
            created_at,
            name: self.name,
            item_schema: self.item_schema,
            include_sample_schema: self.include_sample_schema,
            testing_criteria: self.testing_criteria,
            metadata: self.metadata,
        }
    }
}

impl Eval {
    /// Its graders.
    ///
    /// # Errors
    /// The definition was kept by a program that knew other graders.
    pub fn graders(&self) -> Result<Vec<Grader>, JobsError> {
        graders(&self.testing_criteria)
    }
}

fn graders(criteria: &[Value]) -> Result<Vec<Grader>, JobsError> {
    let mut graders = Vec::with_capacity(criteria.len());
    for (index, criterion) in criteria.iter().enumerate() {
        graders.push(Grader::parse(criterion, &format!("testing_criteria[{index}]"))?);
    }
    Ok(graders)
}
