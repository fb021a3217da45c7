//! Evaluations of a tiny random model: every arm through the engine, and the command around it.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::Arc,
};

use crate::common::{TempDir, fixture};
use candle_core::{D, IndexOp};
use serde_json::{Value, json};
use tunesmith::{
    adapters::{AdapterRegistry, AdapterVersion},
    data::{Row, parse_rows, questions},
    engine::{self, EngineConfig, EngineHandle},
    eval::{EvalReport, Progress, Runner, parse_arms, report::Metadata},
    model::{Decoder, DeltaRows, Step, StepSequence, WeightMode},
    text::{ChatTemplate, Tokenizer},
};

const MODEL: &str = "tiny-llama";
const ADAPTER: &str = "oracle/tiny-llama-plain-adapter";
const NUM_ROWS: usize = 12;
const END: &str = "<|im_end|>";

/// Loaded once, evaluated in different ways.
struct Setup {
    decoder: Arc<Decoder>,
    tokenizer: Arc<Tokenizer>,
    template: ChatTemplate,
    adapter: Arc<AdapterVersion>,
}

impl Setup {
    fn new() -> Self {
        let dir = fixture(MODEL);
        let decoder = Arc::new(Decoder::load(&dir, WeightMode::Frozen).unwrap());
        let registry = AdapterRegistry::new(decoder.config().clone());
        let (adapter, _) = registry.load("tuned", &fixture(ADAPTER), false).unwrap();
        Self {
            decoder,
            tokenizer: Arc::new(Tokenizer::from_dir(&dir).unwrap()),
            template: ChatTemplate::from_dir(&dir).unwrap(),
            adapter,
        }
    }

    fn engine(&self, change: impl FnOnce(&mut EngineConfig)) -> EngineHandle {
        let mut config = EngineConfig::for_model(self.decoder.config(), 8, 64 << 20);
        change(&mut config);
        engine::spawn(Arc::clone(&self.decoder), config).unwrap()
    }

    fn evaluate(&self, engine: &EngineHandle, arms: &str) -> (EvalReport, Vec<Progress>) {
        let stop = self.tokenizer.token_to_id(END).unwrap();
        let runner = Runner {
            engine,
            tokenizer: &self.tokenizer,
            template: &self.template,
            adapters: &[Arc::clone(&self.adapter)],
            stop_token_ids: &[stop],
            max_tokens: Some(10),
            seed: 1,
            max_pending: None,
            should_stop: &|| false,
        };
        let arms = parse_arms(arms, &["tuned".to_owned()]).unwrap();
        let rows = rows();
        let mut progress = Vec::new();
        let report = runner
            .run(
                &arms,
                &questions(&rows[..NUM_ROWS]),
                &rows[NUM_ROWS..],
                Metadata::default(),
                &mut |p| {
                    progress.push(p);
                },
            )
            .unwrap();
        (report, progress)
    }

    /// Negative log-likelihoods and arg max hits of the reference answers' tokens, by one forward
    /// pass per row without a cache.
    fn likelihood(&self, with_adapter: bool) -> (f64, f64) {
        let (mut sum, mut hits, mut count) = (0.0, 0, 0);
        for index in 0..NUM_ROWS {
            let (question, answer) = texts(index);
            let prompt = format!("<|im_start|>user\n{question}{END}\n<|im_start|>assistant\n");
            let mut tokens = self.tokenizer.encode(&prompt, false).unwrap();
            let start = tokens.len();
            tokens.extend(self.tokenizer.encode(&format!("{answer}{END}"), false).unwrap());
            let logit_rows: Vec<u32> =
                (start - 1..tokens.len() - 1).map(|row| row as u32).collect();
            let delta = DeltaRows { rows: 0..tokens.len(), delta: self.adapter.adapter.clone() };
            let deltas = if with_adapter { vec![delta] } else { Vec::new() };
            let sequence =
                StepSequence { num_tokens: tokens.len(), num_cached_tokens: 0, block_table: &[] };
            let logits = self.decoder.forward(&Step {
                tokens: &tokens,
                sequences: &[sequence],
                cache: None,
                deltas: &deltas,
                logit_rows: &logit_rows,
                dropout: None,
            });
            let logprobs = candle_nn::ops::log_softmax(&logits.unwrap(), D::Minus1).unwrap();
            for (row, &target) in tokens[start..].iter().enumerate() {
                let row = logprobs.i(row).unwrap();
                let logprob: f32 = row.i(target as usize).unwrap().to_scalar().unwrap();
                let best: u32 = row.argmax(0).unwrap().to_scalar().unwrap();
                sum -= f64::from(logprob);
                hits += usize::from(best == target);
                count += 1;
            }
        }
        ((sum / f64::from(count)).exp(), hits as f64 / f64::from(count))
    }
}

fn texts(index: usize) -> (String, String) {
    (format!("list {} and {index} eggs", index * 7 % 5), format!("[\"egg\", \"salt {index}\"]"))
}

fn jsonl(range: std::ops::Range<usize>) -> String {
    let row = |index| {
        let (question, answer) = texts(index);
        let messages = json!([
            {"role": "user", "content": question}, {"role": "assistant", "content": answer}
        ]);
        json!({"messages": messages}).to_string() + "\n"
    };
    range.map(row).collect()
}

fn rows() -> Vec<Row> {
    parse_rows(jsonl(0..NUM_ROWS + 4).as_bytes()).0
}

#[test]
fn perplexity_and_token_accuracy_are_those_of_a_plain_forward_pass() {
    let setup = Setup::new();
    let (report, progress) = setup.evaluate(&setup.engine(|_| {}), "base,fewshot:2,tuned");
    let names: Vec<&str> = report.arms.iter().map(|arm| arm.name.as_str()).collect();
    assert_eq!(names, ["base", "fewshot:2", "tuned"]);
    for (arm, with_adapter) in [(0, false), (2, true)] {
        let (perplexity, token_accuracy) = setup.likelihood(with_adapter);
        let arm = &report.arms[arm];
        let relative = (arm.perplexity / perplexity - 1.0).abs();
        assert!(relative < 1e-4, "{}: {} is not {perplexity}", arm.name, arm.perplexity);
        assert!((arm.token_accuracy - token_accuracy).abs() < 1e-9, "{}", arm.name);
        assert_eq!(arm.rows, NUM_ROWS);
    }
    assert_ne!(report.arms[0].perplexity, report.arms[2].perplexity, "the adapter does something");
    assert_eq!(report.arms[0].reference_tokens, report.arms[1].reference_tokens);
    assert!(report.arms[1].prompt_tokens_mean > 2.0 * report.arms[0].prompt_tokens_mean);
    assert_eq!(report.arms[0].prompt_tokens_mean, report.arms[2].prompt_tokens_mean);
    assert_eq!(report.examples.len(), NUM_ROWS);
    assert_eq!(report.comparisons.len(), 3 * 4, "three pairs under four graders");
    assert_eq!(progress.last(), Some(&Progress { done: 72, total: 72 }));
    assert!(progress.is_sorted_by_key(|progress| progress.done));
}

#[test]
fn a_short_queue_changes_no_answer() {
    let setup = Setup::new();
    let (wide, _) = setup.evaluate(&setup.engine(|_| {}), "base,tuned");
    let narrow = setup.engine(|config| (config.max_num_seqs, config.max_queue) = (1, 1));
    let (narrow, _) = setup.evaluate(&narrow, "base,tuned");
    let answers = |report: &EvalReport| -> Vec<Vec<String>> {
        report.examples.iter().map(|row| row.answers.clone()).collect()
    };
    assert_eq!(answers(&wide), answers(&narrow));
    assert_eq!(wide.comparisons, narrow.comparisons);
    // Full by the tokens of the prompts that wait, not by their number.
    let shallow = setup.engine(|config| (config.max_num_seqs, config.max_queue_tokens) = (1, 1));
    let (shallow, _) = setup.evaluate(&shallow, "base,tuned");
    assert_eq!(answers(&wide), answers(&shallow));
    assert!(answers(&wide).iter().any(|row| row[0] != row[1]), "the adapter changes answers");
}

#[test]
fn prompts_that_do_not_fit_are_counted_and_the_rest_goes_on() {
    let setup = Setup::new();
    let (all, _) = setup.evaluate(&setup.engine(|_| {}), "base,fewshot:2");
    let limit = all.arms[0].prompt_tokens_p95 as usize + 4;
    let small = setup.engine(|config| config.max_model_len = limit);
    let (report, _) = setup.evaluate(&small, "base,fewshot:2");
    let [base, few_shot] = &report.arms[..] else { panic!() };
    assert_eq!((base.too_long_rows, few_shot.too_long_rows), (0, NUM_ROWS));
    assert_eq!(few_shot.empty_rows, NUM_ROWS);
    assert!(
        report.warnings.iter().any(|note| note.contains("did not fit")),
        "{:?}",
        report.warnings
    );
}

fn tunesmith(args: &[&str], input: Option<&str>) -> Output {
    let mut process = Command::new(env!("CARGO_BIN_EXE_tunesmith"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    process.stdin.take().unwrap().write_all(input.unwrap_or("").as_bytes()).unwrap();
    process.wait_with_output().unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A folder with eval.jsonl and train.jsonl.
fn data(dir: &TempDir) -> PathBuf {
    fs::write(dir.join("train.jsonl"), jsonl(NUM_ROWS..NUM_ROWS + 4)).unwrap();
    fs::write(dir.join("eval.jsonl"), jsonl(0..NUM_ROWS)).unwrap();
    dir.join("eval.jsonl")
}

#[test]
fn the_command_writes_both_reports_and_fails_when_a_requirement_does_not_hold() {
    let dir = TempDir::new();
    let (data, json, html) = (data(&dir), dir.join("r.json"), dir.join("r.html"));
    let adapter = format!("mine={}", text(&fixture(ADAPTER)));
    let model = fixture(MODEL);
    let mut args =
        vec!["eval", "--model", text(&model), "--adapter", &adapter, "--data", text(&data)];
    args.extend(["--arms", "base,fewshot:2,tuned", "--json", text(&json), "--html", text(&html)]);
    args.extend(["--limit", "8", "--max-tokens", "6", "--require", "tuned>base"]);
    let output = tunesmith(&args, None);
    let (out, err) =
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert_eq!(output.status.code(), Some(1), "{out}{err}");
    assert!(err.contains("required tuned>base:exact_match: does not hold"), "{err}");
    assert!(out.contains("tuned:mine vs base: +0.0 points exact match"), "{out}");
    assert!(out.contains("cannot conclude: 8 rows"), "{out}");
    let report: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    assert_eq!(report["arms"][2]["name"], "tuned:mine");
    assert_eq!(report["arms"][1]["rows"], 8);
    assert_eq!(report["metadata"]["data_sha256"].as_str().map(str::len), Some(64));
    assert_eq!(report["metadata"]["adapters"][0]["digest"].as_str().map(str::len), Some(64));
    assert!(fs::read_to_string(&html).unwrap().contains("tuned:mine vs base"));

    let last = args.len() - 1;
    args[last] = "tuned>=base";
    assert_eq!(tunesmith(&args, None).status.code(), Some(0));
    args[last] = "tuned>nobody";
    let refused = tunesmith(&args, None);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8(refused.stderr).unwrap().contains("nobody"));
}

#[test]
fn chat_answers_a_piped_prompt_the_same_way_each_time_and_with_an_adapter_in_another() {
    let (model, adapter) = (fixture(MODEL), fixture(ADAPTER));
    let base = ["chat", "--model", text(&model), "--max-tokens", "12"];
    let tuned = [&base[..], &["--adapter", text(&adapter)]].concat();
    let [first, second, other] = [&base[..], &base[..], &tuned[..]].map(|args| {
        let output = tunesmith(args, Some("two eggs\n"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    });
    assert!(first.len() > 1);
    assert_eq!(first, second);
    assert_ne!(first, other);
}
