//! `tunesmith demo`: the whole way on bundled data: check, train, evaluate, serve.

mod places;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::atomic::AtomicBool,
    time::Instant,
};

use anyhow::{bail, ensure};
use clap::Args;
use serde_json::Value;

use self::places::Places;
use super::{
    check::{self, CheckArgs},
    eval::{self, EvalArgs},
    progress::Progress,
    serve::{self, ServeArgs},
    train::{Prepared, prepare, show_problems},
};
use crate::data::{Row, RowBody, read_rows};
use crate::eval::{EvalReport, Requirement, table};
use crate::train::{Surroundings, TrainConfig, run_with as train};

/// What clients call the adapter.
const ADAPTER_NAME: &str = "recipe-assistant";
/// What the evaluation compares.
const ARMS: &str = "base,fewshot:3,tuned";
/// Rows that are shown side by side.
const NUM_SAMPLES: usize = 3;

/// Train an adapter on bundled data, compare it with its base, and serve both
///
/// Needs no network and no settings; takes a few minutes on two cores.
#[derive(Args, Debug, Clone)]
pub(super) struct DemoArgs {
    /// End after the evaluation
    #[arg(long)]
    no_serve: bool,
    /// Also write the evaluation's report as JSON to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Folder for adapter and reports; what is in it is replaced
    #[arg(long, value_name = "DIR", default_value = "tunesmith-demo")]
    output: PathBuf,
    /// Port to serve on
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// Folder with tiny-kitchen and recipe-assistant [default: models here, beside the program, or
    /// where it was built]
    #[arg(long, env = "TUNESMITH_MODELS", value_name = "DIR")]
    models_dir: Option<PathBuf>,
    /// Threads of the tensor operations [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
}

/// Runs the command. The exit code is 1 if the tuned arm is not better than the base.
///
/// # Errors
/// Bundled files that are missing, and whatever a step says.
pub(super) fn run(args: &DemoArgs) -> anyhow::Result<ExitCode> {
    if let Some(threads) = args.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    let places = Places::find(args.models_dir.as_deref(), &args.output)?;
    let num_steps = if args.no_serve { 3 } else { 4 };
    let step = |number: usize, title: &str| {
        println!("\n── {number}/{num_steps}  {title} ──");
        Instant::now()
    };
    let done = |start: Instant| println!("({:.1} s)", start.elapsed().as_secs_f64());

    let start = step(1, "check the data");
    let question = check(&places, &places.recipe()?)?;
    done(start);

    let start = step(2, "train an adapter");
    train_adapter(&places, args.threads)?;
    done(start);

    let start = step(3, "compare it with its base on rows it has never seen");
    let report = evaluate(&places, args.json.as_deref())?;
    done(start);

    let requirement: Requirement = "tuned>base".parse()?;
    if let Err(reason) = requirement.check(&report)? {
        eprintln!("the tuned model did not beat its base: {reason}");
        return Ok(ExitCode::FAILURE);
    }
    if args.no_serve {
        return Ok(ExitCode::SUCCESS);
    }
    step(4, "serve both");
    println!("{}", how_to_ask(args.port, &question));
    let command = format!(
        "serve --model {} --adapter {ADAPTER_NAME}={}",
        show(&places.base),
        show(&places.adapter)
    );
    println!("$ tunesmith {command} --port {}\n", args.port);
    serve::run(ServeArgs {
        model: Some(show(&places.base)),
        adapter: vec![format!("{ADAPTER_NAME}={}", show(&places.adapter))],
        port: Some(args.port),
        ..ServeArgs::default()
    })
}

/// What `tunesmith check` does with these flags, and a held-out row; returns that row's question.
fn check(places: &Places, recipe: &TrainConfig) -> anyhow::Result<Vec<Value>> {
    let args = CheckArgs {
        data: places.train.clone(),
        model: Some(show(&places.base)),
        valid: Some(places.test.clone()),
        max_length: recipe.max_length,
        loss_on: recipe.loss_on.into(),
        epochs: recipe.epochs,
        batch_size: recipe.batch_size,
        show: 0,
        columns: None,
        text_column: None,
        json: false,
        method: None,
    };
    println!(
        "$ tunesmith check {} --model {} --valid {}",
        show(&places.train),
        show(&places.base),
        show(&places.test)
    );
    ensure!(check::run(&args)? == ExitCode::SUCCESS, "the bundled data has errors");
    let rows = read_rows(&places.test).map_err(show_problems)?;
    let Some(Row { body: RowBody::Chat { messages, .. }, .. }) = rows.first() else {
        bail!("{} does not start with a chat row", show(&places.test));
    };
    println!("\nthe first row to test with:");
    for message in messages {
        let [role, content] = ["role", "content"].map(|key| message[key].as_str().unwrap_or(""));
        println!("{role:>11}  {}", content.trim_end().replace('\n', "\n             "));
    }
    let is_asked = |message: &&Value| message["role"] != "assistant";
    Ok(messages.iter().filter(is_asked).cloned().collect())
}

/// What `tunesmith train` does with these flags.
fn train_adapter(places: &Places, threads: Option<usize>) -> anyhow::Result<()> {
    let config = TrainConfig {
        model: show(&places.base),
        data: places.train.clone().into(),
        valid: Some(places.valid.clone().into()),
        output: places.adapter.clone(),
        overwrite: true,
        threads,
        ..places.recipe()?
    };
    println!(
        "$ tunesmith train --config {} --model {} --data {} --valid {} --output {}",
        show(&places.recipe),
        config.model,
        show(&places.train),
        show(&places.valid),
        show(&places.adapter)
    );
    config.validate()?;
    let Prepared { job, mut examiner } = prepare(config, &|line| println!("{line}"))?;
    let mut progress = Progress::new();
    let stop = AtomicBool::new(false);
    let around = Surroundings { examiner: Some(&mut examiner), ..Surroundings::default() };
    let result = train(&job, &mut |event| progress.show(event), around, &stop);
    progress.finish();
    let summary = result?;
    println!("published {} after {} steps", summary.path.display(), summary.step);
    Ok(())
}

/// What `tunesmith eval` does with these flags.
fn evaluate(places: &Places, json: Option<&Path>) -> anyhow::Result<EvalReport> {
    let args = EvalArgs {
        model: show(&places.base),
        adapter: vec![show(&places.adapter)],
        data: places.test.clone(),
        train_data: Some(places.train.clone()),
        arms: Some(ARMS.to_owned()),
        seed: 42,
        ..EvalArgs::default()
    };
    println!(
        "$ tunesmith eval --model {} --adapter {} --data {} --arms {ARMS}",
        args.model,
        args.adapter[0],
        show(&args.data)
    );
    let report = eval::evaluate(&args)?;
    print!("\n{}", table::render(&report));
    print!("\n{}\n", table::samples(&report, NUM_SAMPLES));
    let html = places.output.join("report.html");
    eval::write_reports(&report, Some(&places.output.join("report.json")), Some(&html))?;
    if json.is_some() {
        eval::write_reports(&report, json, None)?;
    }
    Ok(report)
}

/// The same question for a shell and for Python.
fn how_to_ask(port: u16, messages: &[Value]) -> String {
    let messages = Value::from(messages.to_vec());
    let body = serde_json::json!({"model": ADAPTER_NAME, "messages": messages, "temperature": 0});
    // Inside single quotes a shell takes everything but a single quote as it stands.
    let body = body.to_string().replace('\'', "'\\''");
    format!(
        "From a shell, as soon as the server listens (Ctrl-C ends it):\n\n\
         curl -s http://127.0.0.1:{port}/v1/chat/completions -H 'Content-Type: application/json' \\\n  \
         -d '{body}'\n\n\
         From Python (pip install openai); the base answers as model=\"{base}\":\n\n\
         from openai import OpenAI\n\
         client = OpenAI(base_url=\"http://127.0.0.1:{port}/v1\", api_key=\"none\")\n\
         messages = {messages}\n\
         answer = client.chat.completions.create(model=\"{ADAPTER_NAME}\", messages=messages, temperature=0)\n\
         print(answer.choices[0].message.content)\n",
        base = places::BASE,
    )
}

fn show(path: &Path) -> String {
    path.display().to_string()
}
