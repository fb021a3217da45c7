//! Where the time of a step goes, beside what this machine could do.

use std::time::Duration;

use serde_json::{Value, json};

use crate::kernels::Roofline;
use crate::model::Quantization;
use crate::ops::profile::{Op, OpTotal};

/// What an operation with these totals takes at least: its bytes have to be read, its operations done.
fn least_seconds(op: Op, total: &OpTotal, limits: &Roofline, quantize: Quantization) -> f64 {
    let per_second = match op {
        Op::Qkv | Op::Output | Op::GateUp | Op::Down | Op::Head => match quantize {
            Quantization::None => limits.f32_per_second,
            Quantization::Bf16 => limits.bf16_per_second,
            Quantization::Int8 | Quantization::Int4 => limits.int8_per_second,
        },
        Op::Embedding
        | Op::Norm
        | Op::Rope
        | Op::Attention
        | Op::Gate
        | Op::Residual
        | Op::Lora
        | Op::Sampling
        | Op::Scheduling
        | Op::Step => limits.f32_per_second,
    };
    let reading = total.bytes as f64 / limits.bytes_per_second;
    reading.max(total.operations as f64 / per_second)
}

/// The table of one kind of work, the most expensive operation first. `limit` is the share of the time that
/// the machine needs at least, where an operation says what it does.
pub(super) fn report(
    work: &str,
    totals: &[(Op, OpTotal)],
    limits: &Roofline,
    quantize: Quantization,
) -> Value {
    let of = |wanted: Op| {
        let found = totals.iter().find(|(op, _)| *op == wanted);
        found.map_or(OpTotal::default(), |(_, total)| *total)
    };
    let step = of(Op::Step);
    let parts: Vec<(Op, OpTotal)> =
        totals.iter().copied().filter(|(op, total)| *op != Op::Step && total.calls > 0).collect();
    let known: Duration = parts.iter().map(|(_, total)| total.time).sum();
    let seconds = step.time.as_secs_f64();
    let mut rows: Vec<Value> = parts
        .iter()
        .map(|(op, total)| {
            let time = total.time.as_secs_f64();
            let least = least_seconds(*op, total, limits, quantize);
            json!({
                "operation": op.name(),
                "seconds": time,
                "share": time / seconds,
                "calls": total.calls,
                "bytes": total.bytes,
                "operations": total.operations,
                "limit": (least > 0.0).then(|| least / time),
            })
        })
        .collect();
    let other = seconds - known.as_secs_f64();
    rows.push(json!({"operation": "other", "seconds": other, "share": other / seconds}));
    rows.sort_by(|a, b| number(&b["seconds"]).total_cmp(&number(&a["seconds"])));
    let least: f64 =
        parts.iter().map(|(op, total)| least_seconds(*op, total, limits, quantize)).sum();
    json!({
        "work": work,
        "steps": step.calls,
        "seconds": seconds,
        "limit": least / seconds,
        "operations": rows,
    })
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(0.0)
}

/// The table for people.
pub(super) fn table(report: &Value) -> String {
    let steps = number(&report["steps"]).max(1.0);
    let mut text = format!(
        "\n{}: {:.2} ms a step, {} steps; the machine's limit is {:.0} % of it\n\
         operation    ms/step   share   calls      GB/s   GFLOP/s   of the limit\n",
        report["work"].as_str().unwrap_or_default(),
        1e3 * number(&report["seconds"]) / steps,
        report["steps"],
        100.0 * number(&report["limit"]),
    );
    for row in report["operations"].as_array().into_iter().flatten() {
        let seconds = number(&row["seconds"]);
        let rate = |value: &Value| match number(value) {
            0.0 => String::new(),
            count => format!("{:.1}", count / seconds / 1e9),
        };
        let limit = row["limit"].as_f64().map_or(String::new(), |l| format!("{:.0} %", 100.0 * l));
        text += &format!(
            "{:<11} {:>8.3} {:>6.1} % {:>7} {:>9} {:>9} {:>14}\n",
            row["operation"].as_str().unwrap_or_default(),
            1e3 * seconds / steps,
            100.0 * number(&row["share"]),
            row["calls"].as_u64().map_or(String::new(), |calls| calls.to_string()),
            rate(&row["bytes"]),
            rate(&row["operations"]),
            limit,
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_operation_is_compared_with_what_limits_it() {
        let total = |milliseconds, bytes, operations| OpTotal {
            calls: 10,
            time: Duration::from_millis(milliseconds),
            bytes,
            operations,
        };
        let totals = [
            (Op::Down, total(400, 5_000_000_000, 0)),
            (Op::Head, total(500, 0, 100_000_000_000)),
            (Op::Norm, total(20, 0, 0)),
            (Op::Lora, total(0, 0, 0)),
            (Op::Step, total(1000, 0, 0)),
        ];
        let limits = Roofline {
            bytes_per_second: 25e9,
            f32_per_second: 400e9,
            bf16_per_second: 800e9,
            int8_per_second: 1000e9,
        };
        let exact = report("decode", &totals, &limits, Quantization::None);
        let row = |report: &Value, name: &str| {
            let rows = report["operations"].as_array().unwrap();
            rows.iter().find(|row| row["operation"] == name).unwrap().clone()
        };
        assert_eq!(row(&exact, "down")["limit"], 0.5);
        assert_eq!(row(&exact, "head")["limit"], 0.5);
        assert_eq!(row(&exact, "norm")["limit"], Value::Null);
        assert!((number(&row(&exact, "other")["seconds"]) - 0.08).abs() < 1e-9);
        assert_eq!(exact["operations"][0]["operation"], "head");
        let rounded = report("decode", &totals, &limits, Quantization::Int8);
        assert_eq!(row(&rounded, "head")["limit"], 0.2);
        let in_bf16 = report("decode", &totals, &limits, Quantization::Bf16);
        assert_eq!(row(&in_bf16, "head")["limit"], 0.25);
        let text = table(&exact);
        assert!(text.contains("100.00 ms a step, 10 steps"), "{text}");
        assert!(text.contains("the machine's limit is 45 % of it"), "{text}");
    }
}
