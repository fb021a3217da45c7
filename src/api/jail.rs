//! Which folders adapters may come from, and which names may become paths.

use std::{
    io,
    path::{Component, Path, PathBuf},
};

use super::error::ApiError;

/// Longest adapter name, in bytes.
const MAX_NAME_BYTES: usize = 256;

/// The folders that clients may load adapters from.
#[derive(Debug, Clone, Default)]
pub struct AdapterRoots {
    /// Where an unknown model name is looked for.
    dir: Option<PathBuf>,
    /// Where `lora_path` must lie. Canonical, and `dir` is the first.
    roots: Vec<PathBuf>,
    /// Folders named at the start, which may be loaded again.
    known: Vec<PathBuf>,
}

impl AdapterRoots {
    /// `dir`'s sub-folders answer to their names; `roots` are further places to load from; `known` are
    /// single folders that the operator named at the start. Without `dir` and `roots`, clients can
    /// load nothing.
    ///
    /// # Errors
    /// When a folder does not exist; the message names it.
    pub fn new(dir: Option<&Path>, roots: &[PathBuf], known: &[PathBuf]) -> io::Result<Self> {
        let canonical = |path: &Path| {
            path.canonicalize().map_err(|error| {
                io::Error::new(error.kind(), format!("{}: {error}", path.display()))
            })
        };
        let dir = dir.map(canonical).transpose()?;
        let mut all: Vec<PathBuf> = dir.iter().cloned().collect();
        for root in roots {
            all.push(canonical(root)?);
        }
        let known = known.iter().map(|path| canonical(path)).collect::<io::Result<_>>()?;
        Ok(Self { dir, roots: all, known })
    }

    /// The folder that `path` names, with every link followed.
    ///
    /// # Errors
    /// 403 when loading is off or the folder lies outside the roots, 404 when it does not exist.
    pub(crate) fn admit(&self, path: &str) -> Result<PathBuf, ApiError> {
        if self.roots.is_empty() {
            return Err(ApiError::Forbidden(
                "loading adapters at run time is off: start the server with --adapter-dir or \
                 --adapter-root"
                    .to_owned(),
            ));
        }
        let outside = || {
            ApiError::Forbidden(format!(
                "`{path}` is outside the folders given by --adapter-dir and --adapter-root"
            ))
        };
        // What lies outside is not even confirmed to be missing.
        let Ok(canonical) = Path::new(path).canonicalize() else {
            let plain = Path::new(path).components().all(|part| part != Component::ParentDir);
            let absolute = std::path::absolute(path).map_err(|_| outside())?;
            return Err(if plain && self.roots.iter().any(|root| absolute.starts_with(root)) {
                ApiError::NotFound(format!("no adapter folder at `{path}`"))
            } else {
                outside()
            });
        };
        let inside = self.roots.iter().any(|root| canonical.starts_with(root));
        if inside || self.known.contains(&canonical) { Ok(canonical) } else { Err(outside()) }
    }

    /// The sub-folder of the adapter folder that is called `name`, if there is one.
    pub(crate) fn find(&self, name: &str) -> Option<PathBuf> {
        let dir = self.dir.as_deref()?;
        if !is_adapter_name(name) || name.contains('/') {
            return None;
        }
        let found = dir.join(name).canonicalize().ok()?;
        let is_adapter = found.starts_with(dir) && found.join("adapter_config.json").is_file();
        is_adapter.then_some(found)
    }
}

/// Whether an adapter may be called `name`: letters, digits and `._:/-`, from a letter or digit on, up
/// to 256 bytes, no part of which is `..`. `@` is left free for versions.
#[must_use]
pub fn is_adapter_name(name: &str) -> bool {
    name.len() <= MAX_NAME_BYTES
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "._:/-".contains(c))
        && name.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(name: &str) -> PathBuf {
        let root = std::env::temp_dir().join(format!("jail-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&root);
        for dir in ["adapters/good", "outside"] {
            std::fs::create_dir_all(root.join(dir)).unwrap();
            std::fs::write(root.join(dir).join("adapter_config.json"), "{}").unwrap();
        }
        std::os::unix::fs::symlink(root.join("outside"), root.join("adapters/escape")).unwrap();
        root.canonicalize().unwrap()
    }

    fn status(roots: &AdapterRoots, path: &Path) -> u16 {
        let admitted = roots.admit(path.to_str().unwrap());
        admitted.map_or_else(|error| error.status().as_u16(), |_| 200)
    }

    #[test]
    fn only_folders_under_a_root_are_admitted_whatever_the_path_looks_like() {
        let root = tree("admit");
        let dir = root.join("adapters");
        let roots = AdapterRoots::new(Some(&dir), &[], &[]).unwrap();
        assert_eq!(status(&roots, &dir.join("good")), 200);
        assert_eq!(status(&roots, &dir.join("missing")), 404);
        assert_eq!(status(&roots, &dir.join("escape")), 403);
        assert_eq!(status(&roots, &dir.join("../outside")), 403);
        assert_eq!(status(&roots, &dir.join("../missing")), 403);
        assert_eq!(status(&roots, &root.join("outside")), 403);
        assert_eq!(status(&roots, Path::new("/etc/passwd")), 403);
        assert_eq!(status(&roots, Path::new("/no/such/folder")), 403);
        let known = AdapterRoots::new(Some(&dir), &[], &[root.join("outside")]).unwrap();
        assert_eq!(status(&known, &root.join("outside")), 200);
        let off = AdapterRoots::new(None, &[], &[root.join("outside")]).unwrap();
        assert_eq!(status(&off, &root.join("outside")), 403);
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn a_model_name_becomes_a_path_only_if_it_is_one_plain_folder() {
        let root = tree("find");
        let roots = AdapterRoots::new(Some(&root.join("adapters")), &[], &[]).unwrap();
        assert_eq!(roots.find("good"), Some(root.join("adapters/good")));
        for name in ["escape", "../outside", "..", ".", "", "/etc", "good/..", "good/", "good\0"] {
            assert_eq!(roots.find(name), None, "{name:?}");
        }
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn names_are_plain() {
        for name in ["a", "ft:tiny:org::x1", "team/recipes-v2", "0.9_b", "a..b"] {
            assert!(is_adapter_name(name), "{name:?}");
        }
        let long = "a".repeat(257);
        for name in ["", "-a", "/a", "a/", "a//b", "a/../b", "a@v1", "a b", "a\n", "é", &long] {
            assert!(!is_adapter_name(name), "{name:?}");
        }
    }
}
