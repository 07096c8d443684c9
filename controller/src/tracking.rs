//! Targets that a Shared binding once registered, kept in a ConfigMap so that a restart does not forget them. The list is in LBC's
//! format; annotations beside it name the binding and the cluster.

use crate::desired::TargetKey;
use crate::index::Key;
use crate::ownership::{Mark, Owner, Tracked};
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, PostParams};
use kube::{Api, Client};
use std::collections::{BTreeMap, BTreeSet};
use tgb_api::names;

/// The ConfigMap of one binding, as last read or written.
pub(crate) struct Tracking {
    api: Api<ConfigMap>,
    name: String,
    mark: Mark,
    /// `None`: there is no ConfigMap.
    map: Option<ConfigMap>,
    /// Targets that the binding registered, as far as they are known.
    pub(crate) targets: BTreeSet<TargetKey>,
    /// The list of the ConfigMap.
    written: BTreeSet<TargetKey>,
    /// The QUIC server ids that are part of the entries of some.
    quic: BTreeMap<TargetKey, String>,
}

impl Tracking {
    /// Reads it. `mark` names the binding that it is read for.
    ///
    /// # Errors
    /// The API server's answer.
    pub(crate) async fn read(client: Client, binding: &Key, mark: Mark) -> Result<Self, kube::Error> {
        let api: Api<ConfigMap> = Api::namespaced(client, &binding.namespace);
        let name = names::tracking_config_map(&binding.name);
        let map = api.get_opt(&name).await?;
        let text = map.as_ref().and_then(|map| map.data.as_ref()?.get(names::TRACKING_CONFIG_MAP_KEY));
        let quic = text.map(|text| parse(text)).unwrap_or_default();
        let targets: BTreeSet<TargetKey> = quic.keys().cloned().collect();
        let quic = quic.into_iter().filter_map(|(key, id)| Some((key, id?))).collect();
        Ok(Self { api, name, mark, map, written: targets.clone(), targets, quic })
    }

    /// Whether there is one.
    pub(crate) fn exists(&self) -> bool {
        self.map.is_some()
    }

    /// The content of the ConfigMap and its owner, if there is one.
    pub(crate) fn tracked(&self) -> Option<Tracked> {
        let annotations = self.map.as_ref()?.metadata.annotations.as_ref();
        let mark = |key: &str| annotations.and_then(|all| all.get(key)).map(String::as_str);
        let owner = self.mark.owner(mark(names::TRACKING_CLUSTER), mark(names::TRACKING_BINDING_UID));
        Some(Tracked { owner, targets: self.written.clone() })
    }

    /// Writes it with the resourceVersion that was read; a conflict means that somebody else wrote.
    /// `quic` are the QUIC server ids of those that have one.
    pub(crate) async fn write(
        &mut self,
        targets: BTreeSet<TargetKey>,
        quic: impl Fn(&TargetKey) -> Option<String>,
    ) -> Result<(), kube::Error> {
        let ids = targets.iter().filter_map(|key| {
            let id = quic(key).or_else(|| self.quic.get(key).cloned())?;
            Some((key.clone(), id))
        });
        let quic: BTreeMap<TargetKey, String> = ids.collect();
        let is_ours = self.tracked().is_some_and(|tracked| tracked.owner == Owner::Us);
        if is_ours && self.written == targets && self.quic == quic {
            return Ok(());
        }
        let mut map = self.map.clone().unwrap_or_else(|| ConfigMap {
            metadata: ObjectMeta { name: Some(self.name.clone()), ..Default::default() },
            ..Default::default()
        });
        let text = print(&targets, &quic);
        map.data.get_or_insert_default().insert(names::TRACKING_CONFIG_MAP_KEY.to_owned(), text);
        let marks = [
            (names::TRACKING_CLUSTER.to_owned(), self.mark.cluster.clone()),
            (names::TRACKING_BINDING_UID.to_owned(), self.mark.uid.clone()),
        ];
        map.metadata.annotations.get_or_insert_default().extend(marks);
        let written = match self.exists() {
            true => self.api.replace(&self.name, &PostParams::default(), &map).await?,
            false => self.api.create(&PostParams::default(), &map).await?,
        };
        self.map = Some(written);
        self.written.clone_from(&targets);
        (self.targets, self.quic) = (targets, quic);
        Ok(())
    }

    /// Deletes that of a binding. One that is not there is as good as deleted; and where we may not touch ConfigMaps, we
    /// have made none.
    pub(crate) async fn remove(client: &Client, binding: &Key) -> Result<(), kube::Error> {
        let api: Api<ConfigMap> = Api::namespaced(client.clone(), &binding.namespace);
        match api.delete(&names::tracking_config_map(&binding.name), &DeleteParams::default()).await {
            Err(kube::Error::Api(status)) if status.is_not_found() || status.is_forbidden() => Ok(()),
            other => other.map(drop),
        }
    }
}

impl TargetKey {
    /// Reads what it prints; an IPv6 address may lack its brackets.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (id, port) = text.rsplit_once(':')?;
        let id = id.strip_prefix('[').and_then(|id| id.strip_suffix(']')).unwrap_or(id);
        let key = Self { id: id.to_owned(), port: port.parse().ok()? };
        Some(key).filter(|key| !key.id.is_empty())
    }
}

/// `id:port` or `id:port:quicId`, separated by commas; what is neither is left out.
fn parse(text: &str) -> BTreeMap<TargetKey, Option<String>> {
    let one = |entry: &str| {
        let (entry, quic) = match entry.rsplit_once(':') {
            Some((rest, quic)) if quic.starts_with("0x") => (rest, Some(quic.to_owned())),
            _ => (entry, None),
        };
        Some((TargetKey::parse(entry)?, quic))
    };
    text.split(',').map(str::trim).filter_map(one).collect()
}

fn print(targets: &BTreeSet<TargetKey>, quic: &BTreeMap<TargetKey, String>) -> String {
    let one = |key: &TargetKey| match quic.get(key) {
        Some(id) => format!("{}:{}:{id}", key.id, key.port),
        None => format!("{}:{}", key.id, key.port),
    };
    let mut entries: Vec<String> = targets.iter().map(one).collect();
    entries.sort_unstable();
    entries.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn again(text: &str) -> String {
        let all = parse(text);
        let quic = all.iter().filter_map(|(key, id)| Some((key.clone(), id.clone()?))).collect();
        print(&all.keys().cloned().collect(), &quic)
    }

    #[test]
    fn lbcs_format_is_read_and_written() {
        for text in
            ["10.0.0.1:80,10.0.0.2:8080,fd00::1:80,i-0123:30080", "10.0.0.1:443:0x0123456789abcdef", ""]
        {
            assert_eq!(again(text), text);
        }
        assert_eq!(again("b:1, a:2,a:2"), "a:2,b:1");
        assert!(parse("x,:80,10.0.0.1:http").is_empty());
    }

    #[test]
    fn a_target_is_read_as_it_is_printed() {
        for text in ["10.0.0.1:80", "[fd00::1]:80", "i-0123:30080"] {
            assert_eq!(TargetKey::parse(text).map(|key| key.to_string()).as_deref(), Some(text));
        }
        assert_eq!(["*", ":80", "10.0.0.1", "10.0.0.1:http"].map(TargetKey::parse), [None, None, None, None]);
    }

    #[test]
    fn fuzz_config_map() {
        let parts = [",", ":", "0x", "i-0123", "10.0.0.1", "fd00::1", "65536", " "];
        tgb_fuzz::fuzz(
            "config-map",
            &[b"10.0.0.1:80,fd00::1:80,i-0123:30080,10.0.0.1:443:0x0123456789abcdef"],
            &parts,
            |input| {
                let printed = again(&String::from_utf8_lossy(input));
                assert_eq!(again(&printed), printed);
                (printed.is_empty(), printed.contains("0x"), printed.matches(',').count().min(5))
            },
        );
    }
}
