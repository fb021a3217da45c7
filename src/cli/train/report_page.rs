//! `report.html` of a training run: one file that needs nothing else, with the loss curve, answers
//! before and after, what was trained on, every setting and the figure of the parity check.

use std::fmt::Write;

use serde_json::Value;

use crate::data::Example;
use crate::eval::{EvalReport, html::STYLE, html::escape};
use crate::train::{Candidate, Examination, TrainConfig, TrainEvent, loss_curve_svg};

/// The whole page. `samples` has the base's answers and then the tuned ones.
pub(super) fn render(
    candidate: &Candidate<'_>,
    examination: &Examination,
    samples: Option<&EvalReport>,
    held_out: bool,
) -> String {
    let name = candidate.job.config.output.file_name().unwrap_or_default().to_string_lossy();
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>Training of {name}</title>\n<style>{STYLE}</style></head>\n<body><main>\n\
         <h1>Training of {name}</h1>\n",
        name = escape(&name)
    );
    // Writing to a string cannot fail.
    let _ = writeln!(page, "<p>{}</p>", escape(&outcome(candidate.events)));
    if let Some(difference) = examination.max_difference {
        let _ = writeln!(
            page,
            "<p>Serving says what training says: the log-probabilities of {} tokens differ by \
             at most {difference:.1e}.</p>",
            examination.num_tokens
        );
    }
    page.push_str("<h2>Loss</h2>\n");
    page.push_str(&loss_curve_svg(candidate.events));
    if let Some(report) = samples {
        answers(&mut page, report, held_out);
    }
    data(&mut page, candidate);
    settings(&mut page, candidate);
    page.push_str("</main></body></html>\n");
    page
}

/// The last losses in a sentence.
fn outcome(events: &[TrainEvent]) -> String {
    let last = events.iter().rev().find_map(|event| {
        let TrainEvent::Step { step, loss, .. } = event else { return None };
        Some(format!("{step} steps, last loss {loss:.4}"))
    });
    let valid = events.iter().rev().find_map(|event| {
        let TrainEvent::Validated { full: true, loss, token_accuracy, .. } = event else {
            return None;
        };
        let accuracy = token_accuracy * 100.0;
        Some(format!(", validation loss {loss:.4}, validation accuracy {accuracy:.1} %"))
    });
    let best = events.iter().rev().find_map(|event| {
        let TrainEvent::Best { step, loss } = event else { return None };
        Some(format!(" What is published was trained up to step {step}, whose validation loss, {loss:.4}, was the best."))
    });
    format!(
        "{}{}.{}",
        last.unwrap_or_else(|| "No steps".to_owned()),
        valid.unwrap_or_default(),
        best.unwrap_or_default()
    )
}

fn answers(page: &mut String, report: &EvalReport, held_out: bool) {
    let rows = if held_out { "validation" } else { "training" };
    let _ = writeln!(page, "<h2>Answers before and after, to {rows} rows</h2>");
    table(page, &["line", "question", "reference", "before", "after"], |page| {
        for example in &report.examples {
            let line = example.line.to_string();
            let texts = [line.as_str(), example.question.as_str(), example.reference.as_str()];
            let answers = example.answers.iter().map(String::as_str);
            row(page, texts.into_iter().chain(answers));
        }
    });
}

fn data(page: &mut String, candidate: &Candidate<'_>) {
    let job = candidate.job;
    page.push_str("<h2>Data</h2>\n");
    table(page, &["role", "file", "rows", "SHA-256"], |page| {
        for source in &job.sources {
            let rows = source.num_rows.to_string();
            row(page, [source.role, source.file.as_str(), rows.as_str(), source.sha256.as_str()]);
        }
    });
    let headings = ["role", "examples", "tokens", "trained tokens", "cut off", "tokens lost"];
    table(page, &headings, |page| {
        for (role, examples) in [("train", &job.train), ("valid", &job.valid)] {
            let sum = |count: fn(&Example) -> usize| -> String {
                examples.iter().map(count).sum::<usize>().to_string()
            };
            let cells = [
                role.to_owned(),
                examples.len().to_string(),
                sum(Example::num_tokens),
                sum(Example::num_trained),
                sum(|example| usize::from(example.num_lost() > 0)),
                sum(Example::num_lost),
            ];
            row(page, cells.iter().map(String::as_str));
        }
    });
}

/// What was set, and folded away what is as it is by default.
fn settings(page: &mut String, candidate: &Candidate<'_>) {
    let of = |config: &TrainConfig| serde_json::to_value(config).unwrap_or_default();
    let (settings, defaults) = (of(&candidate.job.config), of(&TrainConfig::default()));
    let all = || settings.as_object().into_iter().flatten();
    let (set, unset): (Vec<_>, Vec<_>) = all().partition(|(key, value)| defaults[*key] != **value);
    let list = |page: &mut String, settings: &[(&String, &Value)]| {
        table(page, &["key", "value"], |page| {
            for (key, value) in settings {
                row(page, [key.as_str(), value.to_string().as_str()]);
            }
        });
    };
    page.push_str("<h2>Settings</h2>\n");
    list(page, &set);
    let _ = writeln!(page, "<details><summary>{} more, as by default</summary>", unset.len());
    list(page, &unset);
    page.push_str("</details>\n");
}

fn table(page: &mut String, headings: &[&str], rows: impl FnOnce(&mut String)) {
    page.push_str("<div class=\"scroll\"><table class=\"answers\"><thead><tr>");
    for heading in headings {
        let _ = write!(page, "<th>{}</th>", escape(heading));
    }
    page.push_str("</tr></thead><tbody>\n");
    rows(page);
    page.push_str("</tbody></table></div>\n");
}

fn row<'a>(page: &mut String, cells: impl IntoIterator<Item = &'a str>) {
    page.push_str("<tr>");
    for cell in cells {
        let _ = write!(page, "<td>{}</td>", escape(cell));
    }
    page.push_str("</tr>\n");
}
