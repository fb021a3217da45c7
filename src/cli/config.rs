//! Configuration in layers: defaults < YAML file < `TUNESMITH_*` environment < flags.
//!
//! A command's settings are one struct, all of whose fields may be absent. clap fills it from flags and
//! environment (a flag wins); [`with_file`] fills what is still absent from the file. Defaults apply
//! where a setting is read.

use std::path::Path;

use anyhow::Context;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

/// `settings`, with what is absent in it taken from the YAML file at `path`, if there is one. `T` must
/// refuse unknown fields and leave out absent ones when it is serialised.
///
/// # Errors
/// When the file cannot be read, is not valid YAML, or has an unknown key or a value of the wrong type;
/// the message names the file and the place.
pub(crate) fn with_file<T: Serialize + DeserializeOwned>(
    settings: T,
    path: Option<&Path>,
) -> anyhow::Result<T> {
    let Some(path) = path else { return Ok(settings) };
    let yaml = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let file: T = serde_saphyr::from_str(&yaml).with_context(|| path.display().to_string())?;
    let mut merged = fields(&file)?;
    merged.extend(fields(&settings)?);
    Ok(serde_json::from_value(Value::Object(merged))?)
}

fn fields<T: Serialize>(settings: &T) -> anyhow::Result<Map<String, Value>> {
    Ok(serde_json::from_value(serde_json::to_value(settings)?)?)
}

/// A number of bytes as people write it: `512MiB`, `2GiB`, `1.5GB`, `1048576`.
///
/// # Errors
/// When it is something else; the message shows the forms that are understood.
pub(crate) fn parse_bytes(text: &str) -> anyhow::Result<usize> {
    const UNITS: &[(&str, f64)] = &[
        ("", 1.0),
        ("B", 1.0),
        ("kB", 1e3),
        ("MB", 1e6),
        ("GB", 1e9),
        ("KiB", 1024.0),
        ("MiB", 1024.0 * 1024.0),
        ("GiB", 1024.0 * 1024.0 * 1024.0),
    ];
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit.trim()));
    match (number.parse::<f64>(), factor) {
        (Ok(number), Some((_, factor))) => Ok((number * factor) as usize),
        _ => anyhow::bail!("`{text}` is not a number of bytes; write 512MiB, 2GiB or 1048576"),
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
    struct Settings {
        #[serde(skip_serializing_if = "Option::is_none")]
        max_queue: Option<usize>,
        #[serde(skip_serializing_if = "Option::is_none")]
        host: Option<String>,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        adapter: Vec<String>,
    }

    fn file(name: &str, yaml: &str) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("config-{name}-{}.yaml", std::process::id()));
        std::fs::write(&path, yaml).unwrap();
        path
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_fills_the_rest() {
        let path = file("merge", "max-queue: 3\nhost: file\nadapter: [a=b, c=d]\n");
        let flags = Settings { host: Some("flag".to_owned()), ..Settings::default() };
        let merged = with_file(flags, Some(&path)).unwrap();
        let adapter = vec!["a=b".to_owned(), "c=d".to_owned()];
        let expected = Settings { max_queue: Some(3), host: Some("flag".to_owned()), adapter };
        assert_eq!(merged, expected);
        let flags = Settings { adapter: vec!["x=y".to_owned()], ..Settings::default() };
        assert_eq!(with_file(flags, Some(&path)).unwrap().adapter, ["x=y"]);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn an_unknown_key_or_a_wrong_type_is_an_error_that_names_file_and_key() {
        for (name, yaml, word) in [
            ("unknown", "max-queu: 3\n", "max-queu"),
            ("type", "max-queue: many\n", "max-queue"),
            ("syntax", "host: [\n", "line"),
        ] {
            let path = file(name, yaml);
            let error = format!("{:#}", with_file(Settings::default(), Some(&path)).unwrap_err());
            assert!(error.contains(path.to_str().unwrap()), "{error}");
            assert!(error.contains(word), "{error}");
            std::fs::remove_file(path).unwrap();
        }
        let missing = with_file(Settings::default(), Some(Path::new("/no/such.yaml")));
        assert!(format!("{:#}", missing.unwrap_err()).contains("/no/such.yaml"));
    }

    #[test]
    fn bytes_are_read_as_people_write_them() {
        for (text, expected) in
            [("2GiB", 2 << 30), ("512 mib", 512 << 20), ("1.5GB", 1_500_000_000), ("7", 7)]
        {
            assert_eq!(parse_bytes(text).unwrap(), expected, "{text}");
        }
        for text in ["", "GiB", "2 gigs", "-1", "1e9", "2GiBs"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }
}
