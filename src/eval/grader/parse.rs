//! From a grader's JSON to a grader, with every mistake at its place.

use serde_json::Value;

use super::{
    Formula, Grader, Invalid, Kind, Labels, METRICS, Messages, Operation, REFUSED, Sampling,
    template::Template,
};

/// Parts of one `multi` grader.
const MAX_PARTS: usize = 20;
/// Most tokens of a judge's answer, unless asked otherwise: a number, a label, or a few words around it.
const JUDGE_MAX_TOKENS: usize = 256;
/// Bytes of a `python` grader's program, as OpenAI has it.
const MAX_SOURCE_BYTES: usize = 256 << 10;

impl Grader {
    /// Reads a definition; `param` is where it stands in the request.
    ///
    /// # Errors
    /// The first thing that is wrong, with its place.
    pub fn parse(value: &Value, param: &str) -> Result<Self, Invalid> {
        Definition { value, param }.grader(true)
    }
}

/// A definition and its place.
#[derive(Clone, Copy)]
struct Definition<'a> {
    value: &'a Value,
    param: &'a str,
}

impl Definition<'_> {
    fn grader(self, may_be_multi: bool) -> Result<Grader, Invalid> {
        if !self.value.is_object() {
            return Err(Invalid::new(self.param, "must be an object"));
        }
        let (kind, default_threshold) = match self.text("type")? {
            "string_check" => (self.string_check()?, 1.0),
            "text_similarity" => (self.text_similarity()?, 0.5),
            "score_model" => {
                let range = self.range()?;
                (self.score_model(range)?, (range[0] + range[1]) / 2.0)
            }
            "label_model" => (self.label_model()?, 1.0),
            "python" => (self.python()?, 0.5),
            "multi" if may_be_multi => (self.multi()?, 0.5),
            "multi" => return Err(self.wrong("type", "a multi grader has no multi graders in it")),
            other => {
                let message = format!(
                    "unknown grader type `{other}`: expected string_check, text_similarity, \
                     score_model, label_model, python or multi"
                );
                return Err(self.wrong("type", message));
            }
        };
        let given = &self.value["pass_threshold"];
        if !given.is_number() && !given.is_null() {
            return Err(self.wrong("pass_threshold", "is no number"));
        }
        let pass_threshold = given.as_f64().unwrap_or(default_threshold);
        Ok(Grader { name: self.text("name")?.to_owned(), pass_threshold, kind })
    }

    fn string_check(self) -> Result<Kind, Invalid> {
        let operation = match self.text("operation")? {
            "eq" => Operation::Eq,
            "ne" => Operation::Ne,
            "like" => Operation::Like,
            "ilike" => Operation::Ilike,
            other => {
                let message = format!("unknown operation `{other}`: eq, ne, like or ilike");
                return Err(self.wrong("operation", message));
            }
        };
        let (input, reference) = (self.template("input")?, self.template("reference")?);
        Ok(Kind::StringCheck { input, reference, operation })
    }

    fn text_similarity(self) -> Result<Kind, Invalid> {
        let name = self.text("evaluation_metric")?;
        let Some((_, metric)) = METRICS.iter().find(|(known, _)| *known == name) else {
            let message = match REFUSED.iter().find(|(known, _)| *known == name) {
                Some((_, reason)) => format!("`{name}` is not supported by this server: {reason}"),
                None => {
                    let known: Vec<&str> = METRICS.iter().map(|(name, _)| *name).collect();
                    format!("unknown metric `{name}`: expected one of {}", known.join(", "))
                }
            };
            return Err(self.wrong("evaluation_metric", message));
        };
        let (input, reference) = (self.template("input")?, self.template("reference")?);
        Ok(Kind::TextSimilarity { input, reference, metric: *metric })
    }

    fn score_model(self, range: [f64; 2]) -> Result<Kind, Invalid> {
        let (model, input, sampling) = self.judge()?;
        Ok(Kind::ScoreModel { model, input, sampling, range })
    }

    fn range(self) -> Result<[f64; 2], Invalid> {
        let given = &self.value["range"];
        if given.is_null() {
            return Ok([0.0, 1.0]);
        }
        let ends = given.as_array().filter(|ends| ends.len() == 2);
        let ends = ends.and_then(|ends| ends[0].as_f64().zip(ends[1].as_f64()));
        match ends.filter(|(low, high)| low < high) {
            Some((low, high)) => Ok([low, high]),
            None => Err(self.wrong("range", "must be two numbers, the smaller one first")),
        }
    }

    fn label_model(self) -> Result<Kind, Invalid> {
        let (model, input, sampling) = self.judge()?;
        let all = self.texts("labels")?;
        let passing = self.texts("passing_labels")?;
        if let Some(unknown) = passing.iter().find(|label| !all.contains(label)) {
            let message = format!("`{unknown}` is not among the labels");
            return Err(self.wrong("passing_labels", message));
        }
        Ok(Kind::LabelModel { model, input, sampling, labels: Labels { all, passing } })
    }

    fn judge(self) -> Result<(String, Messages, Sampling), Invalid> {
        let model = self.text("model")?.to_owned();
        let input = Messages::parse(&self.value["input"], &self.place("input"))?;
        let params = &self.value["sampling_params"];
        let mut sampling = Sampling::parse(params, &self.place("sampling_params"), 0.0)?;
        sampling.max_tokens.get_or_insert(JUDGE_MAX_TOKENS);
        Ok((model, input, sampling))
    }

    fn python(self) -> Result<Kind, Invalid> {
        let source = self.text("source")?;
        if source.len() > MAX_SOURCE_BYTES {
            let message = format!("has more than {MAX_SOURCE_BYTES} bytes");
            return Err(self.wrong("source", message));
        }
        if !source.contains("def grade") {
            return Err(self.wrong("source", "must define `grade(sample, item)`"));
        }
        Ok(Kind::Python { source: source.to_owned() })
    }

    fn multi(self) -> Result<Kind, Invalid> {
        let given = self.value["graders"].as_object().filter(|given| !given.is_empty());
        let given =
            given.ok_or_else(|| self.wrong("graders", "must be an object of named graders"))?;
        if given.len() > MAX_PARTS {
            return Err(self.wrong("graders", format!("has more than {MAX_PARTS} graders")));
        }
        let mut graders = Vec::with_capacity(given.len());
        for (name, value) in given {
            let param = format!("{}.{name}", self.place("graders"));
            graders.push((name.clone(), Definition { value, param: &param }.grader(false)?));
        }
        let formula = Formula::parse(self.text("calculate_output")?)
            .map_err(|message| self.wrong("calculate_output", message))?;
        if let Some(unknown) = formula.names().iter().find(|name| !given.contains_key(**name)) {
            let message = format!("`{unknown}` is none of the graders");
            return Err(self.wrong("calculate_output", message));
        }
        Ok(Kind::Multi { graders, formula })
    }

    fn template(self, field: &str) -> Result<Template, Invalid> {
        let Some(text) = self.value[field].as_str() else {
            return Err(self.wrong(field, "must be a string"));
        };
        Template::parse(text).map_err(|message| self.wrong(field, message))
    }

    fn text(&self, field: &str) -> Result<&str, Invalid> {
        let text = self.value[field].as_str().filter(|text| !text.is_empty());
        text.ok_or_else(|| self.wrong(field, "is required, and must be a string"))
    }

    fn texts(&self, field: &str) -> Result<Vec<String>, Invalid> {
        let texts = self.value[field].as_array().filter(|texts| !texts.is_empty());
        let texts: Option<Vec<String>> = texts
            .and_then(|texts| texts.iter().map(|text| text.as_str().map(str::to_owned)).collect());
        texts.ok_or_else(|| self.wrong(field, "is required, and must be a list of strings"))
    }

    fn wrong(&self, field: &str, message: impl Into<String>) -> Invalid {
        Invalid::new(self.place(field), message)
    }

    fn place(&self, field: &str) -> String {
        format!("{}.{field}", self.param)
    }
}
