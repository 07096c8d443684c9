//! Where etcd, Kubernetes, kwok, helm and the aws command line come from.

use crate::{Processes, Result, Spec};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const KUBERNETES: &str = "1.37.2";
const NEEDED: [&str; 7] =
    ["etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl", "kwok", "helm"];

/// The programs of the control plane and the Python environment with the AWS tools.
///
/// A program is taken from `KUBEBUILDER_ASSETS` if it is there (what `setup-envtest` fills lacks some of them), else
/// from the user's cache directory, `${XDG_CACHE_HOME:-~/.cache}/tgb`, where it is built the first time.
#[derive(Debug, Clone)]
pub struct Programs {
    kubernetes: BTreeMap<&'static str, PathBuf>,
    venv: PathBuf,
}

impl Programs {
    /// Finds everything and builds what is missing, with a line of progress per program.
    ///
    /// # Errors
    /// One line that says what is missing and what to do.
    pub fn find(processes: &Processes) -> Result<Self> {
        let cache = cache()?;
        let assets = std::env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from);
        let built = cache.join("kubernetes").join(KUBERNETES);
        let given = |name: &str| assets.as_ref().map(|dir| dir.join(name)).filter(|path| path.is_file());
        if NEEDED.iter().any(|name| given(name).is_none()) {
            let script = source_dir().join("kubernetes/build.sh");
            processes.run("control plane", &Spec::new(script, [built.display().to_string()]))?;
        }
        let path = |name: &'static str| (name, given(name).unwrap_or_else(|| built.join(name)));
        let venv = cache.join("venv");
        processes.run("aws tools", &Spec::new(source_dir().join("venv.sh"), [venv.display().to_string()]))?;
        Ok(Self { kubernetes: NEEDED.map(path).into(), venv })
    }

    /// The path of a program of the control plane.
    pub fn kubernetes(&self, name: &str) -> PathBuf {
        self.kubernetes.get(name).cloned().unwrap_or_else(|| PathBuf::from(name))
    }

    /// The directories with kubectl, helm and aws, for a user's `PATH`.
    pub fn directories(&self) -> String {
        let mut dirs: Vec<_> =
            ["kubectl", "helm"].iter().filter_map(|name| self.kubernetes.get(name)?.parent()).collect();
        dirs.dedup();
        let dirs = dirs.into_iter().map(|dir| dir.display().to_string());
        dirs.chain([self.venv.join("bin").display().to_string()]).collect::<Vec<_>>().join(":")
    }

    /// The path of a program of the Python environment: `aws`, `python`, `moto_server`.
    pub fn python(&self, name: &str) -> PathBuf {
        self.venv.join("bin").join(name)
    }
}

/// The directory `e2e` of the checkout.
pub(crate) fn source_dir() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn cache() -> Result<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
    base.map(|dir| dir.join("tgb")).ok_or_else(|| "neither XDG_CACHE_HOME nor HOME is set".to_owned())
}
