//! Names on the Hub: from the cache, or from a Hub that runs in the test.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output, Stdio},
};

use crate::common::{TempDir, copy_dir, fixture};

const COMMIT: &str = "0123456789012345678901234567890123456789";

#[test]
fn a_model_in_the_cache_is_used_without_asking_anybody() {
    let home = TempDir::new();
    let snapshot = cache(&home, "kitchen", "tiny", "main");
    copy_dir(&fixture("tiny-llama"), &snapshot);
    for name in ["kitchen/tiny", &format!("kitchen/tiny@{COMMIT}")] {
        let checked = run(&home, &NOBODY, &["check", &rows(&home), "--model", name]);
        assert!(checked.status.success(), "{}", stderr(&checked));
    }
    let pulled = run(&home, &[OFFLINE], &["pull", "kitchen/tiny"]);
    assert_eq!(stdout(&pulled).trim(), snapshot.to_str().unwrap());
}

#[test]
fn half_a_model_in_the_cache_is_no_model() {
    let home = TempDir::new();
    let snapshot = cache(&home, "kitchen", "shards", "main");
    copy_dir(&fixture("tiny-qwen2"), &snapshot);
    let pulled = run(&home, &[OFFLINE], &["pull", "kitchen/shards"]);
    assert!(pulled.status.success(), "{}", stderr(&pulled));
    fs::remove_file(snapshot.join("model-00002-of-00002.safetensors")).unwrap();
    let pulled = run(&home, &[OFFLINE], &["pull", "kitchen/shards"]);
    assert_eq!(pulled.status.code(), Some(1));
    for word in ["kitchen/shards", "HF_HUB_OFFLINE"] {
        assert!(stderr(&pulled).contains(word), "{}", stderr(&pulled));
    }
}

#[test]
fn what_is_neither_a_folder_nor_a_name_is_refused_without_a_request() {
    let home = TempDir::new();
    for name in ["./missing", "/no/such/folder", "kitchen/../tiny", "tiny", "kitchen/tiny@../x"] {
        let checked = run(&home, &NOBODY, &["check", &rows(&home), "--model", name]);
        assert_eq!(checked.status.code(), Some(1), "{name}");
        assert!(
            stderr(&checked).contains(&format!("no model folder at {name}")),
            "{}",
            stderr(&checked)
        );
    }
}

#[cfg(not(feature = "hub"))]
#[test]
fn a_program_without_downloads_says_how_to_build_one_with_them() {
    let home = TempDir::new();
    let pulled = run(&home, &[], &["pull", "kitchen/tiny"]);
    assert_eq!(pulled.status.code(), Some(1));
    assert!(stderr(&pulled).contains("--features hub"), "{}", stderr(&pulled));
}

#[cfg(feature = "hub")]
mod downloads {
    use std::path::Path;

    use super::hub_server::Hub;
    use super::*;

    #[test]
    fn a_model_is_downloaded_once_and_then_works_offline() {
        let (home, hub) = (TempDir::new(), Hub::start());
        let endpoint = ("HF_ENDPOINT", hub.url.as_str());
        let pulled = run(&home, &[endpoint], &["pull", "kitchen/tiny"]);
        assert!(pulled.status.success(), "{}", stderr(&pulled));
        let text = stdout(&pulled);
        let dir = Path::new(text.trim());
        assert!(dir.starts_with(&home.0) && dir.ends_with(COMMIT), "{}", dir.display());
        let mut names: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        let expected = ["config.json", "generation_config.json", "model.safetensors"];
        assert_eq!(names[..3], expected);
        assert_eq!(names[3..], ["tokenizer.json", "tokenizer_config.json"]);
        for name in names {
            let original = fixture("tiny-llama").join(&name);
            assert_eq!(fs::read(dir.join(&name)).unwrap(), fs::read(original).unwrap(), "{name}");
        }
        assert!(stderr(&pulled).contains("in 5 files"), "{}", stderr(&pulled));

        let checked = run(&home, &NOBODY, &["check", &rows(&home), "--model", "kitchen/tiny"]);
        assert!(checked.status.success(), "{}", stderr(&checked));
        let again = run(&home, &[OFFLINE], &["pull", "kitchen/tiny"]);
        assert_eq!(stdout(&again), text);
    }

    #[test]
    fn a_hub_that_does_not_answer_is_named_with_the_cause_once() {
        let home = TempDir::new();
        let pulled = run(&home, &NOBODY, &["pull", "kitchen/tiny"]);
        assert_eq!(pulled.status.code(), Some(1));
        let expected = format!("error: cannot download kitchen/tiny from {}: ", NOBODY[0].1);
        assert!(stderr(&pulled).starts_with(&expected), "{}", stderr(&pulled));
        assert_eq!(stderr(&pulled).lines().count(), 1, "{}", stderr(&pulled));
    }

    #[test]
    fn what_the_hub_does_not_have_or_cannot_be_used_is_explained() {
        let (home, hub) = (TempDir::new(), Hub::start());
        for (name, words) in [
            ("kitchen/hidden", &["kitchen/hidden", "HF_TOKEN"][..]),
            ("kitchen/gone", &["kitchen/gone", "neither a folder here nor a model on the Hub"]),
            ("kitchen/pickled", &["kitchen/pickled", "pytorch_model.bin", "safetensors"]),
        ] {
            let pulled = run(&home, &[("HF_ENDPOINT", hub.url.as_str())], &["pull", name]);
            assert_eq!(pulled.status.code(), Some(1), "{name}");
            assert_eq!(stdout(&pulled), "");
            for word in words {
                assert!(stderr(&pulled).contains(word), "{name}: {}", stderr(&pulled));
            }
        }
    }
}

const OFFLINE: (&str, &str) = ("HF_HUB_OFFLINE", "1");
/// A Hub that nobody answers for: asking it would fail.
const NOBODY: [(&str, &str); 1] = [("HF_ENDPOINT", "http://127.0.0.1:9")];

/// The program, with nothing of this machine's environment.
fn run(home: &TempDir, variables: &[(&str, &str)], args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tunesmith"))
        .env_clear()
        .env("HF_HOME", &home.0)
        .envs(variables.iter().copied())
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// The folder of a repository's only commit, to which `revision` points.
fn cache(home: &TempDir, owner: &str, name: &str, revision: &str) -> PathBuf {
    let repo = home.join(&format!("hub/models--{owner}--{name}"));
    fs::create_dir_all(repo.join("refs")).unwrap();
    fs::write(repo.join("refs").join(revision), COMMIT).unwrap();
    repo.join("snapshots").join(COMMIT)
}

fn rows(home: &TempDir) -> String {
    let path = home.join("rows.jsonl");
    let row = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
    fs::write(&path, row).unwrap();
    path.to_str().unwrap().to_owned()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// The Hub's endpoints that a download asks, for `kitchen/tiny` and some that are in a bad way.
#[cfg(feature = "hub")]
mod hub_server {
    use std::{
        fs,
        io::{BufRead, BufReader, Write},
        net::{TcpListener, TcpStream},
        thread,
    };

    use serde_json::{Value, json};

    use super::{COMMIT, fixture};

    pub(crate) struct Hub {
        pub(crate) url: String,
    }

    impl Hub {
        /// The thread ends with the test's process.
        pub(crate) fn start() -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let url = format!("http://{}", listener.local_addr().unwrap());
            thread::spawn(move || {
                for stream in listener.incoming() {
                    let stream = stream.unwrap();
                    thread::spawn(move || answer(stream));
                }
            });
            Self { url }
        }
    }

    fn answer(mut stream: TcpStream) {
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
        let Some(request) = lines.next() else { return };
        lines.take_while(|line| !line.is_empty()).for_each(drop);
        let mut words = request.split(' ');
        let (method, path) = (words.next().unwrap(), words.next().unwrap());
        let path = path.split('?').next().unwrap();
        let (status, body) = response(path);
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\nETag: \"{}\"\r\nX-Repo-Commit: {COMMIT}\r\n\
             Content-Type: application/json\r\nConnection: close\r\n\r\n",
            body.len(),
            path.replace('/', "-"),
        );
        // A client that has gone away is its own business.
        let _ = stream.write_all(head.as_bytes());
        if method != "HEAD" {
            let _ = stream.write_all(&body);
        }
    }

    fn response(path: &str) -> (&'static str, Vec<u8>) {
        let files = ["README.md", "original/model.safetensors", "pytorch_model.bin"];
        let model = fs::read_dir(fixture("tiny-llama")).unwrap();
        let model = model.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let files: Vec<String> = files.map(str::to_owned).into_iter().chain(model).collect();
        let list = |form: &dyn Fn(&String) -> Value| files.iter().map(form).collect::<Vec<_>>();
        let json = |value: Value| ("200 OK", value.to_string().into_bytes());
        if path == "/api/models/kitchen/tiny/revision/main" {
            let siblings = list(&|name| json!({"rfilename": name}));
            return json(json!({"id": "kitchen/tiny", "sha": COMMIT, "siblings": siblings}));
        }
        if path == format!("/api/models/kitchen/tiny/tree/{COMMIT}") {
            let entry =
                |name: &String| json!({"type": "file", "oid": "0", "size": 1, "path": name});
            return json(Value::Array(list(&entry)));
        }
        if let Some(name) = path.strip_prefix(&format!("/kitchen/tiny/resolve/{COMMIT}/")) {
            return ("200 OK", fs::read(fixture("tiny-llama").join(name)).unwrap());
        }
        if path.starts_with("/api/models/kitchen/pickled/") {
            let siblings =
                [json!({"rfilename": "config.json"}), json!({"rfilename": "pytorch_model.bin"})];
            return json(json!({"id": "kitchen/pickled", "sha": COMMIT, "siblings": siblings}));
        }
        let status = if path.contains("hidden") { "401 Unauthorized" } else { "404 Not Found" };
        (status, br#"{"error": "Repository not found"}"#.to_vec())
    }
}
