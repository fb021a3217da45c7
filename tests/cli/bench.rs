//! `tunesmith bench` on a tiny model: what it prints, not how fast it is.

use std::{path::Path, process::Command};

use serde_json::Value;

fn bench(flags: &[&str]) -> std::process::Output {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-llama");
    Command::new(env!("CARGO_BIN_EXE_tunesmith"))
        .args(["bench", "--output-tokens", "8", "--threads", "2"])
        .args(["--prompt-tokens", "16", "--model"])
        .arg(model)
        .args(flags)
        .output()
        .unwrap()
}

#[test]
fn a_bench_says_what_adapters_cost_and_where_the_time_goes() {
    let adapters = ["--adapters", "3", "--rank", "4"];
    let run =
        bench(&[&["--batch", "1,4", "--long-prompt", "48", "--json"], &adapters[..]].concat());
    assert!(run.status.success(), "{run:?}");
    let report: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(report["adapters"], 3);
    assert_eq!(report["machine"]["threads"], 2);
    assert!(report["machine"]["bytes_per_second"].as_f64().unwrap() > 0.0);
    let decode = report["decode"].as_array().unwrap();
    assert_eq!(decode.len(), 2);
    assert!(decode.iter().all(|row| row["adapter_cost_percent"].is_number()));
    let work = report["operations"].as_array().unwrap();
    let names: Vec<&Value> = work.iter().map(|table| &table["work"]).collect();
    assert_eq!(names, ["a prompt of 16 tokens", "1 answer", "4 answers at once"]);
    for table in work {
        let rows = table["operations"].as_array().unwrap();
        let of = |name: &str| {
            rows.iter().find(|row| row["operation"] == name).unwrap_or_else(|| panic!("{name}"))
        };
        for part in ["embedding", "norm", "qkv", "rope", "attention", "o", "gate_up", "gate"] {
            assert!(of(part)["calls"].as_u64().unwrap() > 0, "{part}");
        }
        for product in ["qkv", "o", "gate_up", "down", "head", "lora", "attention"] {
            let row = of(product);
            assert!(row["bytes"].as_u64().unwrap() > 0 && row["limit"].is_number(), "{row}");
        }
        let shares: f64 = rows.iter().map(|row| row["share"].as_f64().unwrap()).sum();
        assert!((shares - 1.0).abs() < 1e-6, "{shares}");
    }
}

#[test]
fn adapters_that_a_bench_makes_cost_the_bytes_that_their_dtype_says() {
    let bytes = |flags: &[&str]| {
        let flags = [&["--batch", "2", "--long-prompt", "0", "--json", "--adapters", "2"], flags];
        let run = bench(&flags.concat());
        assert!(run.status.success(), "{run:?}");
        let report: Value = serde_json::from_slice(&run.stdout).unwrap();
        let rows = report["operations"][1]["operations"].as_array().unwrap();
        let row = rows.iter().find(|row| row["operation"] == "lora").unwrap();
        (
            report["lora_dtype"].clone(),
            row["bytes"].as_u64().unwrap() / row["calls"].as_u64().unwrap(),
        )
    };
    let (auto, as_trained) = bytes(&[]);
    let (bfloat16, rounded) = bytes(&["--lora-dtype", "bfloat16"]);
    assert_eq!((auto, bfloat16), ("auto".into(), "bfloat16".into()));
    assert!(as_trained > 0 && as_trained == 2 * rounded, "{as_trained} and {rounded}");
    assert_eq!(bytes(&["--variant", "dora", "--lora-dtype", "float32"]).1, as_trained);
    let refused = bench(&["--adapters", "1", "--variant", "lokr"]);
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("lokr"), "{refused:?}");
}

#[test]
fn rounded_weights_are_measured_and_people_get_a_table() {
    let run = bench(&["--batch", "2", "--quantize", "int8", "--long-prompt", "0"]);
    assert!(run.status.success(), "{run:?}");
    let text = String::from_utf8(run.stdout).unwrap();
    assert!(text.contains("the machine reads") && text.contains("2 answers at once"), "{text}");
    assert!(text.contains("gate_up") && !text.contains("joins"), "{text}");
    let refused = bench(&["--batch", "0"]);
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--batch must be at least 1"));
}
