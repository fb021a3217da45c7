//! What `tunesmith train` says before, while and after it runs: dry runs, memory budgets, generated
//! answers, parity with serving and the report.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use crate::common::{TempDir, fixture};
use serde_json::{Value, json};

/// Runs `tunesmith train` on twelve rows, two of them held out.
fn train(dir: &Path, arguments: &[&str]) -> Output {
    let row = |n: usize| {
        json!({"messages": [{"role": "user", "content": format!("say {n}")},
            {"role": "assistant", "content": format!("{n} <b>{n}</b>")}]})
        .to_string()
    };
    let rows = |numbers: std::ops::Range<usize>| numbers.map(row).collect::<Vec<_>>().join("\n");
    fs::write(dir.join("train.jsonl"), rows(0..10)).unwrap();
    fs::write(dir.join("valid.jsonl"), rows(10..12)).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_tunesmith"));
    command.current_dir(dir).args(["train", "--data", "train.jsonl", "--valid", "valid.jsonl"]);
    let model = fixture("tiny-llama").display().to_string();
    for (flag, value) in [
        ("--output", "out"),
        ("--rank", "4"),
        ("--batch-size", "4"),
        ("--epochs", "2"),
        ("--model", &model),
    ] {
        // What is said below goes before.
        let goes_on = flag == "--rank" && arguments.contains(&"--init-adapter");
        if !goes_on && !arguments.contains(&flag) {
            command.args([flag, value]);
        }
    }
    command.args(arguments).output().unwrap()
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_dry_run_measures_two_steps_after_the_first_and_leaves_nothing_behind() {
    let dir = TempDir::new();
    let text = text(&train(&dir.0, &["--dry-run", "--max-length", "20", "--loss-on", "all"]));
    assert_eq!(names(&dir.0), ["train.jsonl", "valid.jsonl"]);
    for expected in [
        "measured 2 steps after a first of ",
        " s/step, ",
        " tokens/s, ",
        " for 6 steps",
        "memory peak ",
        "an epoch: 10 examples, 200 tokens, 190 of them trained; 10 examples are cut and lose ",
        "10 rows are cut off at 20 tokens (max_length) and lose ",
        "dry run: nothing is written to out",
    ] {
        assert!(text.contains(expected), "{expected:?} is missing in\n{text}");
    }
}

#[test]
fn a_dry_run_refuses_what_the_run_would_and_knows_a_sweep() {
    let dir = TempDir::new();
    for (arguments, expected) in [
        (["--sweep", "batch_size=1,2"], "sweep"),
        (["--sweep", "lr=low,high"], "sweep"),
        (["--sweep", "lr=1e-3,1e-3"], "repeated"),
        (["--lr", "nan"], "no finite number"),
        (["--epochs", "inf"], "no finite number"),
    ] {
        let output = train(&dir.0, &[&["--dry-run"][..], &arguments].concat());
        assert!(!output.status.success(), "{arguments:?}");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(error.contains(expected), "{arguments:?}: {error}");
    }
    let small = text(&train(&dir.0, &["--dry-run"]));
    let large = text(&train(&dir.0, &["--dry-run", "--sweep", "rank=2,8"]));
    assert!(large.contains("a sweep of 2: these are the figures of one, with rank 8"), "{large}");
    let parameters = |text: &str| {
        let rest = text.split("would train ").nth(1).unwrap();
        rest.split(' ').next().unwrap().parse::<usize>().unwrap()
    };
    assert_eq!(parameters(&large), 2 * parameters(&small), "rank 8, where the other has 4");
}

#[test]
fn a_real_run_gives_its_forecast_once_it_is_warm() {
    let dir = TempDir::new();
    let text = text(&train(&dir.0, &[]));
    assert!(
        text.contains("measured 2 steps after a first of ") && text.contains(" for 6 steps"),
        "{text}"
    );
}

#[test]
fn a_memory_budget_chooses_the_micro_batch_or_is_refused_with_numbers() {
    let dir = TempDir::new();
    let roomy = text(&train(&dir.0, &["--dry-run", "--memory", "2GiB"]));
    assert!(roomy.contains("memory: micro_batch_tokens 8192 takes about "), "{roomy}");
    assert!(roomy.contains(" of 2.0 GiB"), "{roomy}");
    let output = train(&dir.0, &["--memory", "1MiB"]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success());
    assert!(
        error.contains("the run does not fit into 1.0 MiB: with one sequence at a time"),
        "{error}"
    );
    assert_eq!(names(&dir.0), ["train.jsonl", "valid.jsonl"]);
}

#[test]
fn the_estimate_of_memory_is_within_a_quarter_of_what_is_measured() {
    let dir = TempDir::new();
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
    let rows = fs::read_to_string(models.join("recipe-assistant/train.jsonl")).unwrap();
    // Rows of one length: the first steps are as large as any.
    let rows = vec![rows.lines().next().unwrap(); 64];
    fs::write(dir.join("rows.jsonl"), rows.join("\n")).unwrap();
    for arguments in [
        &["--memory", "8GiB"][..],
        &["--memory", "150MiB"],
        &["--memory", "8GiB", "--targets", "q_proj,v_proj"],
        &["--memory", "8GiB", "--method", "full"],
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_tunesmith"))
            .current_dir(&dir.0)
            .args(["train", "--data", "rows.jsonl", "--output", "out", "--dry-run", "--model"])
            .arg(models.join("tiny-kitchen"))
            .args(["--threads", "1", "--batch-size", "20"])
            .args(arguments)
            .output()
            .unwrap();
        let text = text(&output);
        let after = |words: &str| -> f64 {
            let rest = text.split(words).nth(1).unwrap_or_else(|| panic!("{words:?} in\n{text}"));
            rest.split_whitespace().next().unwrap().parse().unwrap()
        };
        let (estimate, measured) = (after(" takes about "), after("memory peak "));
        let ratio = estimate / measured;
        assert!((0.75..=1.25).contains(&ratio), "{estimate} MiB and {measured} MiB: {text}");
    }
}

#[test]
fn the_estimate_counts_everything_that_is_trained() {
    let dir = TempDir::new();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-kitchen");
    let model = model.to_str().unwrap();
    let whole = ["--modules-to-save", "embed_tokens"];
    let saved = train(&dir.0, &[&whole[..], &["--output", "saved", "--max-steps", "1"]].concat());
    assert!(saved.status.success(), "{}", String::from_utf8_lossy(&saved.stderr));
    let tiny = fixture("tiny-llama").display().to_string();
    for (model, arguments) in [
        (model, &[][..]),
        (model, &["--rank-pattern", "down_proj=64,layers.0.self_attn.q_proj=32"]),
        (model, &["--layers", "1", "--exclude", "up_proj", "--rank", "40"]),
        (model, &["--variant", "dora"]),
        (model, &whole),
        (model, &["--train-tokens", "5,6,7,8,9,10,11,12,13,14,15,16", "--targets", "q_proj"]),
        (&tiny, &["--init-adapter", "saved"]),
    ] {
        let common = ["--dry-run", "--memory", "8GiB", "--threads", "1", "--model", model];
        let text = text(&train(&dir.0, &[&common[..], arguments].concat()));
        let after = |words: &str| -> f64 {
            let rest = text.split(words).nth(1).unwrap_or_else(|| panic!("{words:?} in\n{text}"));
            rest.split_whitespace().next().unwrap().parse().unwrap()
        };
        // A value, two gradients and two moments of four bytes each.
        let measured = after("would train ") * 20.0 / f64::from(1 << 20);
        let estimate = after("trained parameters ");
        assert!((estimate - measured).abs() < 0.06, "{arguments:?}: {measured} MiB in\n{text}");
    }
}

#[test]
fn a_published_adapter_has_a_report_and_answers_that_it_gave() {
    let dir = TempDir::new();
    let said =
        text(&train(&dir.0, &["--samples", "2", "--eval-generate", "2", "--eval-every", "3"]));
    assert!(said.contains("serving says what training says: log-probabilities of "), "{said}");
    assert!(said.contains("step 3: 2 answers, exact match "), "{said}");
    let out = dir.join("out");
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    for expected in [
        "<svg ",
        "<h2>Answers before and after, to validation rows</h2>",
        "<td>say 11</td><td>11 &lt;b&gt;11&lt;/b&gt;</td>",
        "<td>train</td><td>train.jsonl</td><td>10</td>",
        "<td>batch_size</td><td>4</td>",
        "more, as by default</summary>",
        "differ by at most ",
    ] {
        assert!(page.contains(expected), "{expected:?} is missing in\n{page}");
    }
    let (set, unset) = page.split_once("<details>").unwrap();
    assert!(
        set.contains("<td>batch_size</td>") && unset.contains("<td>weight_decay</td>"),
        "{page}"
    );
    assert!(!page.contains("http://") || page.contains("http://www.w3.org"), "nothing is loaded");
    let card: Value =
        serde_json::from_slice(&fs::read(out.join("tunesmith_card.json")).unwrap()).unwrap();
    let examination = &card["configuration"]["examination"];
    assert!(examination["parity"]["max_difference"].as_f64().unwrap() <= 1e-3, "{examination}");
    assert!(examination["parity"]["num_tokens"].as_u64().unwrap() > 8, "{examination}");
    let golden = examination["golden"].as_array().unwrap();
    assert_eq!((golden.len(), &golden[0]["prompt"]), (2, &json!("say 10")));
    let events = fs::read_to_string(out.join("events.jsonl")).unwrap();
    let events: Vec<Value> =
        events.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |name: &str| events.iter().filter(|event| event["event"] == name).collect::<Vec<_>>();
    assert_eq!(of("parity").len(), 1);
    let generated = of("generated");
    assert_eq!((generated.len(), &generated[0]["num_rows"]), (2, &json!(2)), "{events:?}");
}

#[test]
fn an_adapter_that_became_no_number_in_its_last_step_is_not_published() {
    let dir = TempDir::new();
    let far = ["--lr", "1e30", "--warmup-ratio", "0", "--batch-size", "100", "--epochs", "1"];
    let at_the_end = train(&dir.0, &far);
    let at_an_epoch = train(&dir.0, &[&far[..7], &["2", "--epoch-dir", "epochs"]].concat());
    for output in [at_the_end, at_an_epoch] {
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && error.contains("the adapter after step 1 does not pass: "),
            "{error}"
        );
        assert!(!dir.join("out").exists() && !dir.join("epochs/step-1").exists());
    }
}

#[test]
fn a_model_whose_every_weight_was_trained_is_examined_like_an_adapter() {
    for (dtype, base) in [("bf16", "tiny-llama"), ("f32", "tiny-llama"), ("bf16", "random")] {
        let dir = TempDir::new();
        let model = dir.join("random");
        fs::create_dir(&model).unwrap();
        for entry in fs::read_dir(fixture("tiny-llama")).unwrap().map(Result::unwrap) {
            if base != "random" || entry.path().extension().is_some_and(|it| it != "safetensors") {
                fs::copy(entry.path(), model.join(entry.file_name())).unwrap();
            }
        }
        let model = model.to_str().unwrap();
        let full = ["--method", "full", "--dtype", dtype, "--samples", "2", "--model", model];
        let said = text(&train(&dir.0, &[&full[..], &["--eval-generate", "2"]].concat()));
        assert!(said.contains("serving says what training says: log-probabilities of "), "{said}");
        assert!(said.contains(": 2 answers, exact match "), "{said}");
        let page = fs::read_to_string(dir.join("out/report.html")).unwrap();
        assert!(page.contains("<td>say 11</td><td>11 &lt;b&gt;11&lt;/b&gt;</td>"), "{page}");
        assert_eq!(page.contains("(random weights)"), base == "random", "{page}");
        let card = fs::read(dir.join("out/tunesmith_card.json")).unwrap();
        let card: Value = serde_json::from_slice(&card).unwrap();
        let examination = &card["configuration"]["examination"];
        assert!(examination["parity"]["max_difference"].as_f64().unwrap() <= 1e-3, "{card}");
        assert_eq!(examination["golden"].as_array().unwrap().len(), 2, "{card}");
    }
}

#[test]
fn examinations_change_no_bit_of_the_adapter() {
    let digest = |arguments: &[&str]| {
        let dir = TempDir::new();
        let said = text(&train(&dir.0, arguments));
        said.lines().find(|line| line.starts_with("digest ")).unwrap().to_owned()
    };
    let plain = digest(&["--samples", "0"]);
    let often = ["--eval-generate", "1", "--eval-every", "1", "--parity-examples", "3"];
    assert_eq!(plain, digest(&often));
}
