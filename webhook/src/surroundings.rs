//! What `lint` learns from a cluster and from AWS, where it is told to ask.

use futures::{StreamExt as _, stream};
use kube::Client;
use kube::api::{Api, ApiResource, DynamicObject, ListParams, TypeMeta};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use tgb_api::crd::Version;
use tgb_api::service::Service;
use tgb_api::target_group::TargetGroup;
use tgb_api::v1::{AssumeRole, TargetGroupRef};
use tgb_api::{names, objects};
use tgb_aws::{Aws, Identity, TargetGroupQuery};

/// What a cluster holds.
#[derive(Debug)]
pub(crate) struct Stored {
    /// The namespace of objects that name none.
    pub(crate) namespace: String,
    /// All Services.
    pub(crate) services: Vec<Service>,
    /// All bindings, in the newest version that the cluster serves.
    pub(crate) bindings: Vec<Value>,
    /// The namespaces that ask for readiness gates; absent where namespaces can't be listed.
    pub(crate) injecting: Option<BTreeSet<String>>,
}

/// Asks the cluster of a kubeconfig, or of the usual places.
///
/// # Errors
/// A sentence.
pub(crate) async fn cluster(kubeconfig: Option<&Path>) -> Result<Stored, String> {
    let client = tgb_process::client(kubeconfig).await?;
    let namespace = client.default_namespace().to_owned();
    let services: Api<objects::Service> = Api::all(client.clone());
    let services = services.list(&ListParams::default()).await;
    let services =
        services.map_err(|error| format!("Services can't be listed: {}", tgb_process::told(&error)))?;
    let label = format!("{}={}", names::INJECT_LABEL, names::INJECT_ENABLED);
    let namespaces: Api<objects::Namespace> = Api::all(client.clone());
    let labelled = namespaces.list_metadata(&ListParams::default().labels(&label)).await;
    let injecting =
        labelled.ok().map(|list| list.items.into_iter().filter_map(|it| it.metadata.name).collect());
    let bindings = bindings(&client).await?;
    Ok(Stored {
        namespace,
        services: services.items.iter().map(Service::read).collect(),
        bindings,
        injecting,
    })
}

/// Before a migration the cluster may not serve v1 yet.
async fn bindings(client: &Client) -> Result<Vec<Value>, String> {
    for version in Version::ALL {
        let resource = ApiResource {
            group: names::GROUP.to_owned(),
            version: version.name().to_owned(),
            api_version: version.api_version().to_owned(),
            kind: names::KIND.to_owned(),
            plural: names::PLURAL.to_owned(),
        };
        let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
        let types = TypeMeta { api_version: version.api_version().to_owned(), kind: names::KIND.to_owned() };
        match api.list(&ListParams::default()).await {
            Ok(list) => {
                let whole = |mut object: DynamicObject| {
                    object.types = Some(types.clone());
                    object.metadata.managed_fields = None;
                    serde_json::to_value(object).map_err(|error| error.to_string())
                };
                return list.items.into_iter().map(whole).collect();
            }
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => {
                return Err(format!("TargetGroupBindings can't be listed: {}", tgb_process::told(&error)));
            }
        }
    }
    Err("the cluster knows no TargetGroupBindings".to_owned())
}

/// A target group as a binding names it: ARN or name, role, external id.
pub(crate) type Question = (String, Option<String>, Option<String>);

/// The question that a binding puts to AWS, if it names a target group.
pub(crate) fn question(group: &TargetGroupRef) -> Option<Question> {
    let named = group.arn().or(group.name())?.to_owned();
    let role = group.role();
    Some((
        named,
        role.map(|role| role.role_arn.to_owned()),
        role.and_then(|role| role.external_id).map(str::to_owned),
    ))
}

/// What AWS says of one target group.
#[derive(Debug, Clone)]
pub(crate) struct Described {
    /// Absent if there is none.
    pub(crate) group: Option<TargetGroup>,
    /// Its tags, where rules ask for them.
    pub(crate) tags: Option<BTreeMap<String, String>>,
}

/// What AWS answers to each question, or why it does not.
pub(crate) type Answers = BTreeMap<Question, Result<Described, String>>;

/// Asks AWS who we are, and for each of these target groups; what it answers, or why it did not.
///
/// # Errors
/// A sentence, where AWS can't be asked at all.
pub(crate) async fn aws(
    region: Option<&str>,
    questions: BTreeSet<Question>,
    tags: bool,
) -> Result<(Identity, Answers), String> {
    const AT_A_TIME: usize = 8;
    let settings = tgb_aws::Settings { region: region.map(str::to_owned), ..Default::default() };
    let aws = Aws::connect(settings).await.map_err(|error| error.to_string())?;
    let identity = aws.identity().await.map_err(|error| error.to_string())?.clone();
    let ask = |question: Question| {
        let aws = &aws;
        async move {
            let described = describe(aws, &question, tags).await;
            (question, described)
        }
    };
    let answers = stream::iter(questions).map(ask).buffer_unordered(AT_A_TIME).collect().await;
    Ok((identity, answers))
}

async fn describe(aws: &Aws, question: &Question, tags: bool) -> Result<Described, String> {
    let (named, role_arn, external_id) = question;
    let group = TargetGroupRef {
        assume_role: Some(Box::new(AssumeRole {
            role_arn: role_arn.clone(),
            external_id: external_id.clone(),
        })),
        ..TargetGroupRef::default()
    };
    let query = match named.starts_with("arn:") {
        true => TargetGroupQuery::Arn(named),
        false => TargetGroupQuery::Name(named),
    };
    let group_found = match aws.target_groups(group.role(), query).await {
        Ok(found) => found.into_iter().next(),
        Err(error) if error.is_target_group_not_found() => None,
        Err(error) => return Err(error.to_string()),
    };
    let tags = match &group_found {
        Some(found) if tags => {
            Some(aws.tags(group.role(), found.arn.as_str()).await.map_err(|error| error.to_string())?)
        }
        _ => None,
    };
    Ok(Described { group: group_found, tags })
}
