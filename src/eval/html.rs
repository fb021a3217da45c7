//! A report as one HTML file that needs nothing else: bars with their intervals, the table, the
//! comparisons, answers side by side. Follows the reader's light or dark setting.

use std::fmt::Write;

use super::{
    EvalReport,
    graders::{self, GRADERS},
    report::Example,
    table,
};

/// Rows shown side by side; the JSON report has all of them.
const MAX_EXAMPLES: usize = 60;
/// How a page looks.
pub const STYLE: &str = include_str!("report.css");

/// Width of a chart's bar area and height of one bar's line, in SVG units.
const BAR_AREA: f64 = 360.0;
const LINE_HEIGHT: f64 = 26.0;
/// Where bars start, right of the arms' names.
const BAR_START: f64 = 110.0;

/// The whole page.
#[must_use]
pub fn render(report: &EvalReport) -> String {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>Evaluation of {model}</title>\n<style>{STYLE}</style></head>\n<body><main>\n\
         <h1>Evaluation of {model}</h1>\n",
        model = escape(&report.metadata.model),
    );
    for verdict in table::verdicts(report) {
        let class = if verdict.is_win { "verdict win" } else { "verdict" };
        let _ = writeln!(page, "<p class=\"{class}\">{}</p>", escape(&verdict.text));
    }
    for warning in &report.warnings {
        let _ = writeln!(page, "<p class=\"note\">{}</p>", escape(warning));
    }
    page.push_str("<h2>Scores</h2>\n<div class=\"charts\">\n");
    for index in 0..GRADERS.len() {
        score_chart(&mut page, report, index);
    }
    cost_chart(&mut page, report, "prompt tokens per request", |arm| arm.prompt_tokens_mean);
    cost_chart(&mut page, report, "median milliseconds per answer", |arm| arm.latency_ms_p50);
    page.push_str("</div>\n<h2>All figures</h2>\n");
    arms_table(&mut page, report);
    page.push_str("<h2>Comparisons</h2>\n");
    comparisons_table(&mut page, report);
    page.push_str("<h2>Answers side by side</h2>\n");
    examples_table(&mut page, report);
    metadata(&mut page, report);
    page.push_str("</main></body></html>\n");
    page
}

/// `text` with the five characters that mean something in HTML replaced.
#[must_use]
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}

fn score_chart(page: &mut String, report: &EvalReport, index: usize) {
    let bars = report.arms.iter().map(|arm| {
        let share = arm.scores[index];
        (arm.name.as_str(), share, Some(arm.scores_ci95[index]), format!("{:.1} %", 100.0 * share))
    });
    chart(page, GRADERS[index].title, bars.collect());
}

fn cost_chart(
    page: &mut String,
    report: &EvalReport,
    title: &str,
    value: fn(&super::report::ArmReport) -> f64,
) {
    let largest = report.arms.iter().map(value).fold(f64::MIN_POSITIVE, f64::max);
    let bars = report
        .arms
        .iter()
        .map(|arm| (arm.name.as_str(), value(arm) / largest, None, format!("{:.0}", value(arm))));
    chart(page, title, bars.collect());
}

/// Bars of (name, share of the full width, interval of the share, label).
fn chart(page: &mut String, title: &str, bars: Vec<(&str, f64, Option<[f64; 2]>, String)>) {
    let height = LINE_HEIGHT * bars.len() as f64;
    let _ = write!(
        page,
        "<figure><figcaption>{}</figcaption><svg viewBox=\"0 0 {} {height}\" role=\"img\">",
        escape(title),
        BAR_START + BAR_AREA + 70.0,
    );
    for (index, (name, share, interval, label)) in bars.into_iter().enumerate() {
        let top = LINE_HEIGHT * index as f64;
        let middle = top + LINE_HEIGHT / 2.0;
        let colour = if index == 0 { 0 } else { 1 + (index - 1) % 4 };
        let end = BAR_START + BAR_AREA * share;
        let _ = write!(
            page,
            "<text x=\"{}\" y=\"{}\" class=\"name\">{}</text>\
             <rect x=\"{BAR_START}\" y=\"{}\" width=\"{:.1}\" height=\"{}\" rx=\"3\" class=\"bar{colour}\"/>",
            BAR_START - 8.0,
            middle + 4.5,
            escape(name),
            top + 4.0,
            (end - BAR_START).max(1.0),
            LINE_HEIGHT - 8.0,
        );
        let mut label_start = end;
        if let Some([low, high]) = interval {
            let (low, high) = (BAR_START + BAR_AREA * low, BAR_START + BAR_AREA * high);
            label_start = label_start.max(high);
            let _ = write!(
                page,
                "<path class=\"whisker\" d=\"M{low:.1} {y0}v8m0 -4H{high:.1}m0 -4v8\"/>",
                y0 = middle - 4.0,
            );
        }
        let _ = write!(
            page,
            "<text x=\"{:.1}\" y=\"{}\">{}</text>",
            label_start + 8.0,
            middle + 4.5,
            escape(&label),
        );
    }
    page.push_str("</svg></figure>\n");
}

fn arms_table(page: &mut String, report: &EvalReport) {
    let mut head = vec!["arm".to_owned(), "rows".to_owned()];
    head.extend(GRADERS.iter().map(|grader| grader.title.to_owned()));
    head.extend(
        [
            "perplexity",
            "token accuracy",
            "prompt tokens",
            "p95",
            "answer tokens",
            "first token ms",
            "latency p50 ms",
            "p95 ms",
        ]
        .map(str::to_owned),
    );
    let rows = report.arms.iter().map(|arm| {
        let mut row = vec![arm.name.clone(), arm.rows.to_string()];
        row.extend((arm.scores.iter().zip(&arm.scores_ci95)).map(|(score, [low, high])| {
            let [score, low, high] = [score, low, high].map(|value| 100.0 * value);
            format!("{score:.1} % ({low:.0}–{high:.0})")
        }));
        row.extend([
            format!("{:.3}", arm.perplexity),
            format!("{:.1} %", 100.0 * arm.token_accuracy),
            format!("{:.0}", arm.prompt_tokens_mean),
            format!("{:.0}", arm.prompt_tokens_p95),
            format!("{:.0}", arm.completion_tokens_mean),
            format!("{:.0}", arm.first_token_ms_p50),
            format!("{:.0}", arm.latency_ms_p50),
            format!("{:.0}", arm.latency_ms_p95),
        ]);
        row
    });
    html_table(page, &head, rows);
}

fn comparisons_table(page: &mut String, report: &EvalReport) {
    let head = [
        "arms",
        "metric",
        "difference (points)",
        "95 % CI",
        "p",
        "p (Holm)",
        "test",
        "better on",
        "worse on",
        "detectable from",
    ]
    .map(str::to_owned);
    let rows = report.comparisons.iter().map(|pair| {
        let grader = graders::position(pair.metric).map_or("", |index| GRADERS[index].title);
        vec![
            format!("{} vs {}", pair.a, pair.b),
            grader.to_owned(),
            format!("{:+.1}", 100.0 * pair.difference),
            format!("{:+.1} … {:+.1}", 100.0 * pair.ci95[0], 100.0 * pair.ci95[1]),
            table::p_text(pair.p_value),
            table::p_text(pair.p_holm),
            pair.test.to_owned(),
            format!("{} rows", pair.wins),
            format!("{} rows", pair.losses),
            format!("{:.1}", 100.0 * pair.minimum_detectable),
        ]
    });
    html_table(page, &head, rows);
}

fn html_table(page: &mut String, head: &[String], rows: impl Iterator<Item = Vec<String>>) {
    page.push_str("<div class=\"scroll\"><table><thead><tr>");
    for cell in head {
        let _ = write!(page, "<th>{}</th>", escape(cell));
    }
    page.push_str("</tr></thead><tbody>\n");
    for row in rows {
        page.push_str("<tr>");
        for cell in row {
            let _ = write!(page, "<td>{}</td>", escape(&cell));
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody></table></div>\n");
}

fn examples_table(page: &mut String, report: &EvalReport) {
    let shown = report.examples.len().min(MAX_EXAMPLES);
    let _ = writeln!(page, "<p>{shown} of {} rows.</p>", report.examples.len());
    page.push_str("<div class=\"scroll\"><table class=\"answers\"><thead><tr>");
    page.push_str("<th>line</th><th>question</th><th>reference</th>");
    for arm in &report.arms {
        let _ = write!(page, "<th>{}</th>", escape(&arm.name));
    }
    page.push_str("</tr></thead><tbody>\n");
    for row in &report.examples[..shown] {
        example_row(page, row);
    }
    page.push_str("</tbody></table></div>\n");
}

fn example_row(page: &mut String, row: &Example) {
    let _ = write!(
        page,
        "<tr><td>{}</td><td>{}</td><td>{}</td>",
        row.line,
        escape(&row.question),
        escape(&row.reference),
    );
    for (answer, scores) in row.answers.iter().zip(&row.scores) {
        let (class, mark) = if scores[0] == 1.0 { ("right", "✓") } else { ("wrong", "✗") };
        let _ = write!(page, "<td class=\"{class}\"><b>{mark}</b> {}</td>", escape(answer));
    }
    page.push_str("</tr>\n");
}

fn metadata(page: &mut String, report: &EvalReport) {
    let metadata = &report.metadata;
    let mut facts = vec![
        ("model", metadata.model.clone()),
        ("model fingerprint", metadata.model_fingerprint.clone()),
        ("data", metadata.data.clone()),
        ("data SHA-256", metadata.data_sha256.clone()),
    ];
    for (name, digest) in &metadata.adapters {
        facts.push(("adapter", format!("{name} {digest}")));
    }
    facts.extend([
        ("decoding", format!("greedy, at most {} tokens", metadata.max_tokens)),
        ("seed", metadata.seed.to_string()),
        ("time", format!("{:.1} s for all requests", metadata.seconds)),
        ("tunesmith", env!("CARGO_PKG_VERSION").to_owned()),
    ]);
    page.push_str("<h2>What was evaluated</h2>\n<dl>");
    for (name, value) in facts {
        let _ = write!(page, "<dt>{name}</dt><dd>{}</dd>", escape(&value));
    }
    page.push_str("</dl>\n");
}
