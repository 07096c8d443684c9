//! The laws of conversion, over arbitrary objects.

use super::*;
use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

/// `TGB_PROVE_CASES` raises the number of cases: `make prove`.
fn config() -> ProptestConfig {
    let cases = std::env::var("TGB_PROVE_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(256);
    ProptestConfig {
        cases,
        max_local_rejects: u32::MAX,
        max_global_rejects: u32::MAX,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

// Generators: members are (name, perhaps a value); absent ones are left out.

type Strategy_ = BoxedStrategy<Value>;

fn text() -> Strategy_ {
    prop_oneof![Just(String::new()), "[a-z0-9:/-]{1,12}", "\\PC{0,6}"].prop_map(Value::from).boxed()
}

fn word(words: &'static [&'static str]) -> Strategy_ {
    select(words).prop_map(Value::from).boxed()
}

fn list(items: Strategy_) -> Strategy_ {
    vec(items, 0..3).prop_map(Value::from).boxed()
}

fn count() -> Strategy_ {
    (0..100_u32).prop_map(Value::from).boxed()
}

fn port() -> Strategy_ {
    prop_oneof![(0..65536_u32).prop_map(Value::from), "[a-z]{1,8}".prop_map(Value::from)].boxed()
}

fn labels() -> Strategy_ {
    btree_map("[a-z./]{1,8}", text(), 0..3).prop_map(|all| Value::Object(all.into_iter().collect())).boxed()
}

/// What no version knows, by names that none maps.
fn unknown() -> BoxedStrategy<Map<String, Value>> {
    let leaf = prop_oneof![any::<bool>().prop_map(Value::from), any::<i64>().prop_map(Value::from), text()];
    let value = leaf.prop_recursive(2, 6, 3, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..3).prop_map(Value::from),
            btree_map("[a-z]{1,4}", inner, 0..3).prop_map(|all| Value::Object(all.into_iter().collect())),
        ]
    });
    let some =
        btree_map("future[A-Z]{1,3}", value, 1..3).prop_map(|all| all.into_iter().collect::<Map<_, _>>());
    prop_oneof![3 => Just(Map::new()), 1 => some].boxed()
}

/// An object of these members, each perhaps absent, and perhaps of unknown ones.
fn object(optional: Vec<(&'static str, Strategy_)>) -> Strategy_ {
    object_with(vec![], optional)
}

fn object_with(
    required: Vec<(&'static str, Strategy_)>,
    optional: Vec<(&'static str, Strategy_)>,
) -> Strategy_ {
    let required = required.into_iter().map(|(key, value)| value.prop_map(move |it| Some((key, it))).boxed());
    let optional =
        optional.into_iter().map(|(key, value)| option::of(value.prop_map(move |it| (key, it))).boxed());
    let members: Vec<_> = required.into_iter().chain(optional).collect();
    (members, unknown())
        .prop_map(|(members, mut all)| {
            all.extend(members.into_iter().flatten().map(|(key, value)| (key.to_owned(), value)));
            Value::Object(all)
        })
        .boxed()
}

/// `{}` is not schema-valid where the schema has minProperties, so it reads as absent.
fn not_empty(member: Strategy_) -> Strategy_ {
    member.prop_filter("minProperties", |it| it.as_object().is_some_and(|it| !it.is_empty())).boxed()
}

const PROTOCOLS: &[&str] = &["HTTP", "HTTPS", "TCP", "TLS", "UDP", "TCP_UDP", "QUIC", "TCP_QUIC"];

fn service_ref() -> Strategy_ {
    object_with(vec![("name", text())], vec![("port", port())])
}

fn networking() -> Strategy_ {
    let group = object_with(vec![("groupID", text())], vec![]);
    let block = object_with(vec![("cidr", text())], vec![]);
    let peer = object(vec![("securityGroup", group), ("ipBlock", block)]);
    let opened = object(vec![("protocol", word(&["TCP", "UDP"])), ("port", port())]);
    let rule = object_with(vec![("from", list(peer))], vec![("ports", list(opened))]);
    object(vec![("ingress", list(rule))])
}

fn node_selector() -> Strategy_ {
    let operators = word(&["In", "NotIn", "Exists", "DoesNotExist"]);
    let requirement =
        object_with(vec![("key", text()), ("operator", operators)], vec![("values", list(text()))]);
    object(vec![("matchLabels", labels()), ("matchExpressions", list(requirement))])
}

fn status(all: bool) -> Strategy_ {
    let time = || word(&["2026-01-02T03:04:05Z", "2026-01-02T03:04:05.678901Z", "2026-01-02T03:04:05+02:00"]);
    let condition = object_with(
        vec![
            ("type", text()),
            ("status", word(&["True", "False", "Unknown"])),
            ("reason", word(&["Registered", "FailedCleanup"])),
            ("message", text()),
            ("lastTransitionTime", time()),
        ],
        vec![("observedGeneration", count())],
    );
    let counts = ["desired", "registered", "healthy", "unhealthy", "draining"].map(|key| (key, count()));
    let targets = counts.into_iter().chain([("summary", text()), ("observedAt", time())]).collect();
    let mut members = vec![("observedGeneration", count())];
    if all {
        members.extend([
            ("targetGroupARN", text()),
            ("conditions", list(condition)),
            ("targets", object(targets)),
        ]);
    }
    object(members)
}

fn spec_v1() -> Strategy_ {
    let role = not_empty(object(vec![("roleARN", text()), ("externalID", text())]));
    let group = not_empty(object(vec![
        ("arn", text()),
        ("name", text()),
        ("targetType", word(&["instance", "ip"])),
        ("protocol", word(PROTOCOLS)),
        ("ipAddressType", word(&["ipv4", "ipv6"])),
        ("vpcID", text()),
        ("sharing", word(&["Exclusive", "Shared"])),
        ("assumeRole", role),
    ]));
    object_with(
        vec![("targetGroup", group), ("serviceRef", service_ref())],
        vec![("networking", networking()), ("nodeSelector", node_selector())],
    )
}

fn spec_old(beta: bool) -> Strategy_ {
    let mut members = vec![
        ("targetGroupARN", text()),
        ("targetGroupName", text()),
        ("targetType", word(&["instance", "ip"])),
        ("multiClusterTargetGroup", any::<bool>().prop_map(Value::from).boxed()),
        ("iamRoleArnToAssume", text()),
        ("assumeRoleExternalId", text()),
        ("networking", networking()),
    ];
    if beta {
        members.extend([
            ("targetGroupProtocol", word(PROTOCOLS)),
            ("ipAddressType", word(&["ipv4", "ipv6"])),
            ("vpcID", text()),
            ("nodeSelector", node_selector()),
        ]);
    }
    object_with(vec![("serviceRef", service_ref())], members)
}

/// `own`: perhaps with a user's annotation by the name of ours.
fn metadata(own: bool) -> Strategy_ {
    let annotations = (labels(), option::of(text())).prop_map(move |(mut all, mine)| {
        if let (true, Some(mine), Value::Object(all)) = (own, mine, &mut all) {
            all.insert(names::CONVERSION_DATA.into(), mine);
        }
        all
    });
    let fields = Just(json!([{"manager": "m", "fieldsV1": {"f:spec": {"f:targetGroupARN": {}, "k": null}}}]));
    object(vec![
        ("name", text()),
        ("namespace", text()),
        ("labels", labels()),
        ("annotations", annotations.boxed()),
        ("managedFields", fields.boxed()),
        ("creationTimestamp", prop_oneof![Just(Value::Null), Just("2026-01-02T03:04:05Z".into())].boxed()),
    ])
}

fn binding(version: Version) -> Strategy_ {
    let (spec, status) = match version {
        Version::V1 => (spec_v1(), status(true)),
        Version::V1Beta1 => (spec_old(true), status(true)),
        Version::V1Alpha1 => (spec_old(false), status(false)),
    };
    let kind = vec![
        ("apiVersion", Just(version.api_version().into()).boxed()),
        ("kind", Just(names::KIND.into()).boxed()),
        ("metadata", metadata(version != Version::V1Alpha1)),
    ];
    // Partial objects, as managedFields are made of, lack spec or status.
    object_with(kind, vec![("spec", spec), ("status", status)])
}

/// There and back, where no step may drop anything.
fn round(object: Value, by: Version) -> Value {
    let from = Version::of_api_version(object["apiVersion"].as_str().unwrap()).unwrap();
    let mut notes = vec![];
    let there = convert_noting(object, by, &mut notes).unwrap();
    assert_eq!(there["apiVersion"], by.api_version());
    let back = convert_noting(there, from, &mut notes).unwrap();
    assert_eq!(notes, []);
    back
}

fn without_annotation(mut object: Value) -> Value {
    if let Some(all) = object.pointer_mut("/metadata/annotations").and_then(Value::as_object_mut) {
        all.remove(names::CONVERSION_DATA);
    }
    object
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn v1beta1_by_way_of_v1_is_the_identity(object in binding(Version::V1Beta1)) {
        prop_assert_eq!(round(object.clone(), Version::V1), object);
    }

    #[test]
    fn v1_by_way_of_v1beta1_is_the_identity(object in binding(Version::V1)) {
        prop_assert_eq!(round(object.clone(), Version::V1Beta1), object);
    }

    #[test]
    fn v1alpha1_by_way_of_v1_is_the_identity(object in binding(Version::V1Alpha1)) {
        prop_assert_eq!(round(object.clone(), Version::V1), object);
    }

    #[test]
    fn v1_by_way_of_v1alpha1_is_the_identity(object in binding(Version::V1)) {
        prop_assert_eq!(round(object.clone(), Version::V1Alpha1), object);
    }

    #[test]
    fn v1beta1_by_way_of_v1alpha1_is_the_identity(object in binding(Version::V1Beta1)) {
        prop_assert_eq!(round(object.clone(), Version::V1Alpha1), object);
    }

    #[test]
    fn v1alpha1_with_what_it_carries_is_the_same_after_a_trip_to_v1(object in binding(Version::V1)) {
        let carrying = convert(object, Version::V1Alpha1).unwrap();
        prop_assert_eq!(round(carrying.clone(), Version::V1), carrying);
    }

    /// The edit replaces the whole spec by another one of v1alpha1: its fields are what it says, and what was kept comes
    /// back for the same target group only.
    #[test]
    fn an_edit_in_v1alpha1_wins_over_what_was_kept(
        object in binding(Version::V1),
        edit in spec_old(false),
        same_group in any::<bool>(),
    ) {
        prop_assume!(object.get("spec").is_some());
        let mut edit = edit;
        let mut old = convert(object.clone(), Version::V1Alpha1).unwrap();
        if same_group {
            for key in ["targetGroupARN", "targetGroupName", "targetType"] {
                let members = edit.as_object_mut().unwrap();
                members.remove(key);
                members.extend(old["spec"].get(key).map(|value| (key.to_owned(), value.clone())));
            }
        }
        let same = ["targetGroupARN", "targetGroupName", "targetType"].iter().all(|key| edit.get(*key) == old["spec"].get(*key));
        old["spec"] = edit.clone();
        let new = convert(convert(old, Version::V1).unwrap(), Version::V1Beta1).unwrap();
        let kept = convert(object, Version::V1Beta1).unwrap();
        let mut expected = edit;
        if same {
            for key in SPEC_LACKS {
                expected.as_object_mut().unwrap().extend(kept["spec"].get(key).map(|value| (key.to_owned(), value.clone())));
            }
        }
        prop_assert_eq!(&new["spec"], &expected);
    }

    #[test]
    fn an_edit_in_v1beta1_wins(object in binding(Version::V1), edit in spec_old(true)) {
        let mut old = convert(object, Version::V1Beta1).unwrap();
        old["spec"] = edit;
        prop_assert_eq!(round(old.clone(), Version::V1), old);
    }

    #[test]
    fn conversion_never_changes_metadata_but_for_its_annotation(
        object in prop_oneof![binding(Version::V1), binding(Version::V1Beta1)],
    ) {
        for to in Version::ALL {
            let mut new = without_annotation(convert(object.clone(), to).unwrap());
            let old = without_annotation(object.clone());
            if old["metadata"].get("annotations").is_none() && new["metadata"]["annotations"] == json!({}) {
                new["metadata"].as_object_mut().unwrap().remove("annotations");
            }
            prop_assert_eq!(&new["metadata"], &old["metadata"]);
        }
    }

    #[test]
    fn garbage_in_the_annotation_never_fails_and_never_reaches_the_object(
        object in binding(Version::V1Alpha1),
        garbage in prop_oneof![
            text(),
            (unknown(), unknown()).prop_map(|(spec, status)| {
                let none = Value::Null;
                json!({"for": [none, none, none], "spec": spec, "status": status}).to_string().into()
            }),
        ],
    ) {
        let clean = convert(object.clone(), Version::V1).unwrap();
        let mut dirty = object;
        dirty["metadata"]["annotations"][names::CONVERSION_DATA] = garbage;
        let mut new = convert(dirty, Version::V1).unwrap();
        if clean["metadata"].get("annotations").is_none() {
            new["metadata"].as_object_mut().unwrap().remove("annotations");
        }
        prop_assert_eq!(new, clean);
    }

    #[test]
    fn a_null_member_is_an_absent_one(object in binding(Version::V1Beta1)) {
        let mut with_nulls = object.clone();
        with_nulls["status"]["conditions"] = object.pointer("/status/conditions").cloned().unwrap_or_default();
        prop_assume!(object.get("status").is_some());
        with_nulls["spec"]["vpcID"] = object.pointer("/spec/vpcID").cloned().unwrap_or_default();
        prop_assume!(object.get("spec").is_some());
        prop_assert_eq!(round(with_nulls, Version::V1), object);
    }
}

fn v1(spec: Value) -> Value {
    json!({"apiVersion": "elbv2.k8s.aws/v1", "kind": "TargetGroupBinding", "metadata": {"name": "web", "namespace": "shop"}, "spec": spec})
}

#[test]
fn every_field_of_v1beta1_has_its_place_in_v1() {
    let old = json!({
        "apiVersion": "elbv2.k8s.aws/v1beta1", "kind": "TargetGroupBinding",
        "spec": {
            "targetGroupARN": "a", "targetGroupName": "n", "targetType": "ip", "targetGroupProtocol": "TCP",
            "ipAddressType": "ipv4", "vpcID": "v", "multiClusterTargetGroup": true,
            "iamRoleArnToAssume": "r", "assumeRoleExternalId": "e",
            "serviceRef": {"name": "web", "port": 0}, "networking": {"ingress": [{"from": [], "ports": null}]},
        },
    });
    let new = json!({
        "apiVersion": "elbv2.k8s.aws/v1", "kind": "TargetGroupBinding", "metadata": {},
        "spec": {
            "targetGroup": {
                "arn": "a", "name": "n", "targetType": "ip", "protocol": "TCP", "ipAddressType": "ipv4", "vpcID": "v",
                "sharing": "Shared", "assumeRole": {"roleARN": "r", "externalID": "e"},
            },
            "serviceRef": {"name": "web", "port": 0}, "networking": {"ingress": [{"from": []}]},
        },
    });
    assert_eq!(convert(old, Version::V1).unwrap(), new);
}

#[test]
fn the_other_versions_paths_cannot_be_smuggled_in() {
    let mut old = v1(json!({"targetGroupARN": "mine", "targetGroup": {"arn": "a"}}));
    assert_eq!(convert(old.clone(), Version::V1Beta1).unwrap()["spec"], json!({"targetGroupARN": "a"}));
    old["apiVersion"] = "elbv2.k8s.aws/v1beta1".into();
    assert_eq!(convert(old, Version::V1).unwrap()["spec"], json!({"targetGroup": {"arn": "mine"}}));
}

#[test]
fn the_same_version_is_left_as_it_is() {
    let object =
        json!({"apiVersion": "elbv2.k8s.aws/v1", "kind": "TargetGroupBinding", "spec": {"networking": null}});
    assert_eq!(convert(object.clone(), Version::V1).unwrap(), object);
}

#[test]
fn what_is_kept_for_v1alpha1_has_a_bound_and_the_spec_comes_first() {
    let mut object = v1(json!({"targetGroup": {"arn": "a", "vpcID": "v"}}));
    object["status"] = json!({"targetGroupARN": "x".repeat(MOST_KEPT)});
    let mut notes = vec![];
    let old = convert_noting(object, Version::V1Alpha1, &mut notes).unwrap();
    assert!(old["metadata"]["annotations"][names::CONVERSION_DATA].as_str().unwrap().len() <= MOST_KEPT);
    assert_eq!((notes.len(), notes[0].object.as_str()), (1, "shop/web"));
    let new = convert(old, Version::V1).unwrap();
    assert_eq!(new["spec"]["targetGroup"]["vpcID"], "v");
    assert_eq!(new["status"], json!({}));
}

#[test]
fn kept_values_that_do_not_match_the_schema_are_dropped_with_a_note() {
    for (key, value) in [
        ("targetGroupProtocol", json!("GENEVE")),
        ("ipAddressType", json!("ipv5")),
        ("vpcID", json!(5)),
        ("vpcID", json!("v".repeat(254))),
        ("nodeSelector", json!({"matchLabels": {"a": 1}})),
        ("nodeSelector", json!({"matchExpressions": [{"key": "a"}]})),
    ] {
        let mut old = v1(json!({"targetGroupARN": "a"}));
        old["apiVersion"] = "elbv2.k8s.aws/v1alpha1".into();
        let kept = json!({"for": ["a", null, null], "spec": {key: value}}).to_string();
        old["metadata"]["annotations"] = json!({names::CONVERSION_DATA: kept});
        let mut notes = vec![];
        let new = convert_noting(old, Version::V1, &mut notes).unwrap();
        assert_eq!(new["spec"], json!({"targetGroup": {"arn": "a"}}), "{key}");
        assert_eq!(notes.len(), 1, "{key}");
    }
}

#[test]
fn a_review_is_all_or_nothing_and_keeps_its_order() {
    let named = |name: &str| {
        let mut object = v1(json!({}));
        object["metadata"]["name"] = name.into();
        object
    };
    let new = convert_objects(vec![named("b"), named("a")], "elbv2.k8s.aws/v1beta1").unwrap();
    assert_eq!(new.iter().map(|it| &it["metadata"]["name"]).collect::<Vec<_>>(), ["b", "a"]);

    let mut other = named("c");
    other["kind"] = "Pod".into();
    let failed = convert_objects(vec![named("a"), other], "elbv2.k8s.aws/v1beta1").unwrap_err();
    assert!(failed.to_string().contains("\"Pod\""), "{failed}");
    let failed = convert_objects(vec![named("a")], "elbv2.k8s.aws/v7").unwrap_err();
    assert!(failed.to_string().contains("\"elbv2.k8s.aws/v7\""), "{failed}");
    assert_eq!(convert_objects(vec![json!(3)], "elbv2.k8s.aws/v1"), Err(ConvertError::NotAnObject));
}
