//! What a Shared binding once registered, kept in a ConfigMap so that a restart does not forget it.

use crate::desired::TargetKey;
use crate::index::Key;
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, PostParams};
use kube::{Api, Client};
use std::collections::BTreeSet;
use tgb_api::names;

/// The ConfigMap of one binding, as last read or written.
pub(crate) struct Tracking {
    api: Api<ConfigMap>,
    name: String,
    /// `None`: there is no ConfigMap.
    map: Option<ConfigMap>,
    pub(crate) targets: BTreeSet<TargetKey>,
}

impl Tracking {
    /// Reads it.
    pub(crate) async fn read(client: Client, binding: &Key) -> Result<Self, kube::Error> {
        let api: Api<ConfigMap> = Api::namespaced(client, &binding.namespace);
        let name = names::tracking_config_map(&binding.name);
        let map = api.get_opt(&name).await?;
        let text = map.as_ref().and_then(|map| map.data.as_ref()?.get(names::TRACKING_CONFIG_MAP_KEY));
        let targets = text.map(|text| parse(text)).unwrap_or_default();
        Ok(Self { api, name, map, targets })
    }

    /// Whether there is one.
    pub(crate) fn exists(&self) -> bool {
        self.map.is_some()
    }

    /// Writes it with the resourceVersion that was read; a conflict means that somebody else wrote.
    pub(crate) async fn write(&mut self, targets: BTreeSet<TargetKey>) -> Result<(), kube::Error> {
        if self.exists() && self.targets == targets {
            return Ok(());
        }
        let mut map = self.map.clone().unwrap_or_else(|| ConfigMap {
            metadata: ObjectMeta { name: Some(self.name.clone()), ..Default::default() },
            ..Default::default()
        });
        let text = print(&targets);
        map.data.get_or_insert_default().insert(names::TRACKING_CONFIG_MAP_KEY.to_owned(), text);
        let written = match self.exists() {
            true => self.api.replace(&self.name, &PostParams::default(), &map).await?,
            false => self.api.create(&PostParams::default(), &map).await?,
        };
        self.map = Some(written);
        self.targets = targets;
        Ok(())
    }

    /// Deletes it.
    pub(crate) async fn delete(self) -> Result<(), kube::Error> {
        match self.api.delete(&self.name, &DeleteParams::default()).await {
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            other => other.map(drop),
        }
    }
}

/// `id:port` or `id:port:quicId`, separated by commas; what is neither is left out.
fn parse(text: &str) -> BTreeSet<TargetKey> {
    let one = |entry: &str| {
        let entry = match entry.rsplit_once(':') {
            Some((rest, quic)) if quic.starts_with("0x") => rest,
            _ => entry,
        };
        let (id, port) = entry.rsplit_once(':')?;
        Some(TargetKey { id: id.to_owned(), port: port.parse().ok()? }).filter(|key| !key.id.is_empty())
    };
    text.split(',').map(str::trim).filter_map(one).collect()
}

fn print(targets: &BTreeSet<TargetKey>) -> String {
    let mut entries: Vec<String> = targets.iter().map(|key| format!("{}:{}", key.id, key.port)).collect();
    entries.sort_unstable();
    entries.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lbcs_format_is_read_and_written() {
        let text = "10.0.0.1:80,10.0.0.2:8080,fd00::1:80,i-0123:30080";
        assert_eq!(print(&parse(text)), text);
        let with_quic = parse("10.0.0.1:443:0x0123456789abcdef");
        assert_eq!(print(&with_quic), "10.0.0.1:443");
        assert!(parse("").is_empty() && parse("x,:80,10.0.0.1:http").is_empty());
    }
}
