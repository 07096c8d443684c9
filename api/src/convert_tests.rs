//! The laws of conversion, over arbitrary objects.
//!
//! The objects come from a generator of our own: a million of them per law have to be made in minutes. A case is its
//! number, so a failure names all that is needed to see it again.

use super::*;

/// `TGB_PROVE_CASES` raises the number of cases: `make prove`.
fn cases() -> u64 {
    std::env::var("TGB_PROVE_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(2000)
}

/// Holds a law against all cases.
fn prove(law: impl Fn(&mut Random)) {
    struct Case(u64);
    impl Drop for Case {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("in case {}", self.0);
            }
        }
    }
    for number in 0..cases() {
        let case = Case(number);
        law(&mut Random(fastrand::Rng::with_seed(number)));
        drop(case);
    }
}

/// Makes schema-valid values, and members that no version knows.
struct Random(fastrand::Rng);

const PROTOCOLS: &[&str] = &["HTTP", "HTTPS", "TCP", "TLS", "UDP", "TCP_UDP", "QUIC", "TCP_QUIC"];
const TARGET_TYPES: &[&str] = &["instance", "ip"];
const IP_ADDRESS_TYPES: &[&str] = &["ipv4", "ipv6"];

/// How a member of an object is made.
type Make = fn(&mut Random) -> Value;

impl Random {
    fn half(&mut self) -> bool {
        self.0.bool()
    }

    fn letters(&mut self, of: &[u8], least: usize, most: usize) -> String {
        (0..self.0.usize(least..=most)).map(|_| char::from(of[self.0.usize(..of.len())])).collect()
    }

    fn text(&mut self) -> Value {
        match self.0.u8(..8) {
            0 => "".into(),
            1 => (0..self.0.usize(..6)).map(|_| self.0.char(' '..=char::MAX)).collect::<String>().into(),
            2 => ["\u{0}\n\t", "null", "\"", "\\", "{}", "true", "é", "\u{2028}"][self.0.usize(..8)].into(),
            _ => self.letters(b"abcdefghijklmnopqrstuvwxyz0123456789:/-", 1, 12).into(),
        }
    }

    fn word(&mut self, words: &[&str]) -> Value {
        words[self.0.usize(..words.len())].into()
    }

    fn list(&mut self, item: Make) -> Value {
        (0..self.0.usize(..3)).map(|_| item(self)).collect()
    }

    fn count(&mut self) -> Value {
        self.0.u32(..100).into()
    }

    fn port(&mut self) -> Value {
        if self.half() { self.0.u32(..65536).into() } else { self.letters(b"abcdefgh", 1, 8).into() }
    }

    fn labels(&mut self) -> Value {
        (0..self.0.usize(..3)).map(|_| (self.letters(b"abcdefgh./", 1, 8), self.text())).collect()
    }

    /// What no version knows.
    fn anything(&mut self, depth: u8) -> Value {
        match self.0.u8(..if depth == 0 { 4 } else { 6 }) {
            0 => self.half().into(),
            1 => self.0.i64(..).into(),
            2 => {
                // What is no number in JSON would be a null, which is as good as absent.
                let float = f64::from_bits(self.0.u64(..));
                if float.is_finite() { float.into() } else { f64::MIN_POSITIVE.into() }
            }
            3 => self.text(),
            4 => (0..self.0.usize(..3)).map(|_| self.anything(depth - 1)).collect(),
            _ => (0..self.0.usize(..3))
                .map(|_| (self.letters(b"abcd", 1, 4), self.anything(depth - 1)))
                .collect(),
        }
    }

    /// By names that no version maps.
    fn unknown(&mut self) -> Map<String, Value> {
        if self.0.u8(..4) > 0 {
            return Map::new();
        }
        (0..self.0.usize(1..3))
            .map(|_| (format!("future{}", self.letters(b"ABC", 1, 3)), self.anything(2)))
            .collect()
    }

    /// An object of these members, each perhaps absent, and perhaps of unknown ones.
    fn object(&mut self, members: &[(&str, Make)]) -> Value {
        let mut all = self.unknown();
        for (key, make) in members {
            if self.half() {
                all.insert((*key).to_owned(), make(self));
            }
        }
        Value::Object(all)
    }

    /// With members that are always there.
    fn object_with(&mut self, required: &[(&str, Make)], optional: &[(&str, Make)]) -> Value {
        let mut made = self.object(optional);
        for (key, make) in required {
            made[*key] = make(self);
        }
        made
    }

    /// `{}` is not schema-valid where the schema has minProperties, so it reads as absent.
    fn not_empty(&mut self, members: &[(&str, Make)]) -> Value {
        loop {
            let made = self.object(members);
            if made != json!({}) {
                return made;
            }
        }
    }

    fn service_ref(&mut self) -> Value {
        self.object_with(&[("name", Self::text)], &[("port", Self::port)])
    }

    fn networking(&mut self) -> Value {
        self.object(&[("ingress", |r| r.list(Self::rule))])
    }

    fn rule(&mut self) -> Value {
        self.object_with(&[("from", |r| r.list(Self::peer))], &[("ports", |r| r.list(Self::opened))])
    }

    fn peer(&mut self) -> Value {
        self.object(&[
            ("securityGroup", |r| r.object_with(&[("groupID", Self::text)], &[])),
            ("ipBlock", |r| r.object_with(&[("cidr", Self::text)], &[])),
        ])
    }

    fn opened(&mut self) -> Value {
        self.object(&[("protocol", |r| r.word(&["TCP", "UDP"])), ("port", Self::port)])
    }

    fn node_selector(&mut self) -> Value {
        self.object(&[("matchLabels", Self::labels), ("matchExpressions", |r| r.list(Self::requirement))])
    }

    fn requirement(&mut self) -> Value {
        let operator: Make = |r| r.word(&["In", "NotIn", "Exists", "DoesNotExist"]);
        self.object_with(
            &[("key", Self::text), ("operator", operator)],
            &[("values", |r| r.list(Self::text))],
        )
    }

    fn time(&mut self) -> Value {
        self.word(&["2026-01-02T03:04:05Z", "2026-01-02T03:04:05.678901Z", "2026-01-02T03:04:05+02:00"])
    }

    fn condition(&mut self) -> Value {
        self.object_with(
            &[
                ("type", Self::text),
                ("status", |r| r.word(&["True", "False", "Unknown"])),
                ("reason", |r| r.word(&["Registered", "FailedCleanup"])),
                ("message", Self::text),
                ("lastTransitionTime", Self::time),
            ],
            &[("observedGeneration", Self::count)],
        )
    }

    fn targets(&mut self) -> Value {
        self.object(&[
            ("desired", Self::count),
            ("registered", Self::count),
            ("healthy", Self::count),
            ("unhealthy", Self::count),
            ("draining", Self::count),
            ("summary", Self::text),
            ("observedAt", Self::time),
        ])
    }

    fn status(&mut self) -> Value {
        self.object(&[
            ("observedGeneration", Self::count),
            ("targetGroupARN", Self::text),
            ("conditions", |r| r.list(Self::condition)),
            ("targets", Self::targets),
        ])
    }

    fn spec_v1(&mut self) -> Value {
        let role: Make = |r| r.not_empty(&[("roleARN", Self::text), ("externalID", Self::text)]);
        let group: Make = |r| {
            r.not_empty(&[
                ("arn", Self::text),
                ("name", Self::text),
                ("targetType", |r| r.word(TARGET_TYPES)),
                ("protocol", |r| r.word(PROTOCOLS)),
                ("ipAddressType", |r| r.word(IP_ADDRESS_TYPES)),
                ("vpcID", Self::text),
                ("sharing", |r| r.word(&["Exclusive", "Shared"])),
            ])
        };
        let mut spec = self.object_with(
            &[("targetGroup", group), ("serviceRef", Self::service_ref)],
            &[("networking", Self::networking), ("nodeSelector", Self::node_selector)],
        );
        if self.half() {
            spec["targetGroup"]["assumeRole"] = role(self);
        }
        spec
    }

    fn spec_old(&mut self, beta: bool) -> Value {
        let mut spec = self.object_with(
            &[("serviceRef", Self::service_ref)],
            &[
                ("targetGroupARN", Self::text),
                ("targetGroupName", Self::text),
                ("targetType", |r| r.word(TARGET_TYPES)),
                ("multiClusterTargetGroup", |r| r.half().into()),
                ("iamRoleArnToAssume", Self::text),
                ("assumeRoleExternalId", Self::text),
                ("networking", Self::networking),
            ],
        );
        if beta {
            let more = self.object(&[
                ("targetGroupProtocol", |r| r.word(PROTOCOLS)),
                ("ipAddressType", |r| r.word(IP_ADDRESS_TYPES)),
                ("vpcID", Self::text),
                ("nodeSelector", Self::node_selector),
            ]);
            if let (Value::Object(spec), Value::Object(more)) = (&mut spec, more) {
                spec.extend(more);
            }
        }
        spec
    }

    /// `own`: perhaps with a user's annotation by the name of ours.
    fn metadata(&mut self, own: bool) -> Value {
        let mut metadata = self.object(&[
            ("name", Self::text),
            ("namespace", Self::text),
            ("labels", Self::labels),
            ("annotations", Self::labels),
            (
                "managedFields",
                |_| json!([{"manager": "m", "fieldsV1": {"f:spec": {"f:targetGroupARN": {}, "k": null}}}]),
            ),
            ("creationTimestamp", |r| if r.half() { Value::Null } else { r.time() }),
        ]);
        if own
            && self.0.u8(..4) == 0
            && let Some(Value::Object(annotations)) = metadata.get_mut("annotations")
        {
            annotations.insert(names::CONVERSION_DATA.into(), self.text());
        }
        metadata
    }

    fn binding(&mut self, version: Version) -> Value {
        let mut made = Value::Object(self.unknown());
        made["apiVersion"] = version.api_version().into();
        made["kind"] = names::KIND.into();
        made["metadata"] = self.metadata(version != Version::V1Alpha1);
        // Partial objects, as managedFields are made of, lack spec or status.
        if self.0.u8(..8) > 0 {
            made["spec"] = match version {
                Version::V1 => self.spec_v1(),
                Version::V1Beta1 => self.spec_old(true),
                Version::V1Alpha1 => self.spec_old(false),
            };
        }
        if self.half() {
            made["status"] = match version {
                Version::V1Alpha1 => self.object(&[("observedGeneration", Self::count)]),
                _ => self.status(),
            };
        }
        made
    }
}

/// There and back, each time from text, where no step may drop anything.
fn round(object: Value, by: Version) -> Value {
    let from = Version::of_api_version(object["apiVersion"].as_str().unwrap()).unwrap();
    let mut notes = vec![];
    let mut step = |object: Value, to| {
        let object = json::read(&object.to_string()).unwrap();
        convert_noting(object, to, &mut notes).unwrap()
    };
    let there = step(object, by);
    assert_eq!(there["apiVersion"], by.api_version());
    let back = step(there, from);
    assert_eq!(notes, []);
    back
}

fn without_annotation(mut object: Value) -> Value {
    if let Some(all) = object.pointer_mut("/metadata/annotations").and_then(Value::as_object_mut) {
        all.remove(names::CONVERSION_DATA);
    }
    object
}

fn is_identity(from: Version, by: Version) {
    prove(|random| {
        let object = random.binding(from);
        assert_eq!(round(object.clone(), by), object);
    });
}

#[test]
fn v1beta1_by_way_of_v1_is_the_identity() {
    is_identity(Version::V1Beta1, Version::V1);
}

#[test]
fn v1_by_way_of_v1beta1_is_the_identity() {
    is_identity(Version::V1, Version::V1Beta1);
}

#[test]
fn v1alpha1_by_way_of_v1_is_the_identity() {
    is_identity(Version::V1Alpha1, Version::V1);
}

#[test]
fn v1_by_way_of_v1alpha1_is_the_identity() {
    is_identity(Version::V1, Version::V1Alpha1);
}

#[test]
fn v1beta1_by_way_of_v1alpha1_is_the_identity() {
    is_identity(Version::V1Beta1, Version::V1Alpha1);
}

#[test]
fn v1alpha1_by_way_of_v1beta1_is_the_identity() {
    is_identity(Version::V1Alpha1, Version::V1Beta1);
}

#[test]
fn v1alpha1_with_what_it_carries_is_the_same_after_a_trip_to_v1() {
    prove(|random| {
        let carrying = convert(random.binding(Version::V1), Version::V1Alpha1).unwrap();
        assert_eq!(round(carrying.clone(), Version::V1), carrying);
    });
}

/// The edit replaces the whole spec by another one of v1alpha1: its fields are what it says, and what was kept comes
/// back for the same target group only.
#[test]
fn an_edit_in_v1alpha1_wins_over_what_was_kept() {
    const IDENTITY: [&str; 3] = ["targetGroupARN", "targetGroupName", "targetType"];
    prove(|random| {
        let object = random.binding(Version::V1);
        if object.get("spec").is_none() {
            return;
        }
        let mut edit = random.spec_old(false);
        let mut old = convert(object.clone(), Version::V1Alpha1).unwrap();
        if random.half() {
            let members = edit.as_object_mut().unwrap();
            for key in IDENTITY {
                members.remove(key);
                members.extend(old["spec"].get(key).map(|value| (key.to_owned(), value.clone())));
            }
        }
        let same = IDENTITY.iter().all(|key| edit.get(*key) == old["spec"].get(*key));
        old["spec"] = edit.clone();
        let new = convert(convert(old, Version::V1).unwrap(), Version::V1Beta1).unwrap();
        let kept = convert(object, Version::V1Beta1).unwrap();
        let mut expected = edit;
        if same {
            for key in SPEC_LACKS {
                let value = kept["spec"].get(key).map(|value| (key.to_owned(), value.clone()));
                expected.as_object_mut().unwrap().extend(value);
            }
        }
        assert_eq!(&new["spec"], &expected);
    });
}

#[test]
fn an_edit_in_v1beta1_wins() {
    prove(|random| {
        let mut old = convert(random.binding(Version::V1), Version::V1Beta1).unwrap();
        old["spec"] = random.spec_old(true);
        assert_eq!(round(old.clone(), Version::V1), old);
    });
}

#[test]
fn conversion_never_changes_metadata_but_for_its_annotation() {
    prove(|random| {
        let from = if random.half() { Version::V1 } else { Version::V1Beta1 };
        let object = random.binding(from);
        for to in Version::ALL {
            let mut new = without_annotation(convert(object.clone(), to).unwrap());
            let old = without_annotation(object.clone());
            if old["metadata"].get("annotations").is_none() && new["metadata"]["annotations"] == json!({}) {
                new["metadata"].as_object_mut().unwrap().remove("annotations");
            }
            assert_eq!(&new["metadata"], &old["metadata"]);
        }
    });
}

#[test]
fn garbage_in_the_annotation_never_fails_and_never_reaches_the_object() {
    prove(|random| {
        let object = random.binding(Version::V1Alpha1);
        let garbage = if random.half() {
            random.text()
        } else {
            let (none, spec, status) = (Value::Null, random.unknown(), random.unknown());
            json!({"for": [none, none, none], "spec": spec, "status": status}).to_string().into()
        };
        let clean = convert(object.clone(), Version::V1).unwrap();
        let mut dirty = object;
        dirty["metadata"]["annotations"][names::CONVERSION_DATA] = garbage;
        let mut new = convert(dirty, Version::V1).unwrap();
        if clean["metadata"].get("annotations").is_none() {
            new["metadata"].as_object_mut().unwrap().remove("annotations");
        }
        assert_eq!(new, clean);
    });
}

/// A person cuts, doubles or swaps what the annotation holds: no failure, nothing that the schema forbids, and the rest
/// of the object is what it was.
#[test]
fn an_annotation_that_was_edited_by_hand_never_breaks_the_object() {
    prove(|random| {
        let mut old = convert(random.binding(Version::V1), Version::V1Alpha1).unwrap();
        let Some(Value::String(kept)) =
            old.pointer_mut("/metadata/annotations/elbv2.k8s.aws~1conversion-data")
        else {
            return;
        };
        let mut bytes = kept.clone().into_bytes();
        let at = random.0.usize(..bytes.len());
        match random.0.u8(..4) {
            0 => bytes.truncate(at),
            1 => bytes[at] = random.0.u8(b' '..=b'~'),
            2 => bytes.insert(at, random.0.u8(b' '..=b'~')),
            _ => drop(bytes.remove(at)),
        }
        *kept = String::from_utf8_lossy(&bytes).into_owned();
        let mut bare = old.clone();
        bare["metadata"]["annotations"].as_object_mut().unwrap().remove(names::CONVERSION_DATA);
        let mut new = convert(convert(old, Version::V1).unwrap(), Version::V1Beta1).unwrap();
        let mut expected = convert(bare, Version::V1Beta1).unwrap();
        for (member, lacks) in [("spec", &SPEC_LACKS[..]), ("status", &STATUS_LACKS[..])] {
            let Some(Value::Object(found)) = new.get_mut(member) else { continue };
            for key in lacks {
                if let Some(value) = found.remove(*key) {
                    assert!(schema::allows(member, key, &value), "{member}.{key}: {value}");
                }
            }
        }
        // What the user had there, or that there was nothing, is part of what was kept.
        for object in [&mut new, &mut expected] {
            object["metadata"].as_object_mut().unwrap().remove("annotations");
        }
        assert_eq!(new, expected);
    });
}

#[test]
fn a_null_member_is_an_absent_one() {
    prove(|random| {
        let object = random.binding(Version::V1Beta1);
        let mut with_nulls = object.clone();
        for (member, keys) in [("spec", ["vpcID", "networking"]), ("status", ["conditions", "targets"])] {
            if let Some(Value::Object(members)) = with_nulls.get_mut(member) {
                members_or_null(members, &keys);
            }
        }
        assert_eq!(round(with_nulls, Version::V1), object);
    });
}

fn members_or_null(members: &mut Map<String, Value>, keys: &[&str]) {
    for key in keys {
        members.entry(*key).or_insert(Value::Null);
    }
}

/// The API server demands `metadata`, and sends server-side apply objects without.
#[test]
fn an_object_without_metadata_comes_back_with_an_empty_one() {
    prove(|random| {
        let from = [Version::V1, Version::V1Beta1, Version::V1Alpha1][random.0.usize(..3)];
        let mut object = random.binding(from);
        object.as_object_mut().unwrap().remove("metadata");
        for to in Version::ALL.into_iter().filter(|to| *to != from) {
            let there = convert(object.clone(), to).unwrap();
            if to != Version::V1Alpha1 {
                assert_eq!(there["metadata"], json!({}));
            }
            let mut back = convert(there, from).unwrap();
            assert_eq!(back["metadata"], json!({}));
            back.as_object_mut().unwrap().remove("metadata");
            assert_eq!(back, object);
        }
    });
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

#[test]
fn from_text_to_text_is_the_same_conversion() {
    prove(|random| {
        for from in Version::ALL {
            let object = random.binding(from);
            for to in Version::ALL {
                let (mut out, mut notes, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
                let had = convert_text(&format!(" {object:#}"), to, &mut out, &mut notes).unwrap();
                assert_eq!(had, from);
                let converted = convert_noting(object.clone(), to, &mut wanted).unwrap();
                assert_eq!(json::read(std::str::from_utf8(&out).unwrap()).unwrap(), converted);
                assert_eq!(notes, wanted);
            }
        }
    });
}

#[test]
fn text_with_strange_members_is_converted_as_its_value_is() {
    let strange = [
        "",
        r#""metadata":null,"#,
        r#""metadata":[null],"#,
        r#""metadata":{},"metadata":{"a":null},"#,
        r#""metadata":{"a":1},"metadata":3,"#,
        r#""spec":null,"#,
        r#""spec":[null],"#,
        r#""spec":{"networking":{"a":[1,{"b":null}]},"x":"null","y":true,"z":{}},"#,
        r#""spec":{"networking":{"a":1},"networking":{"a":null},"targetType":"ip","targetType":null},"#,
        r#""spec":{"networking":{"a":null},"networking":{"a":1}},"#,
        r#""spec":{"a":1,"b":2},"spec":{"a":null,"b":true},"#,
        r#""status":{"a":null,"b":1},"#,
        r#""status":{"b":1},"status":{"a":null},"#,
        r#""status":{"a":null},"status":{},"#,
    ];
    for members in strange {
        let text = format!(r#"{{{members}"apiVersion":"elbv2.k8s.aws/v1","kind":"TargetGroupBinding"}}"#);
        for to in Version::ALL {
            let mut out = Vec::new();
            convert_text(&text, to, &mut out, &mut Vec::new()).unwrap();
            let value = serde_json::from_str(&text).unwrap();
            assert_eq!(serde_json::from_slice::<Value>(&out).unwrap(), convert(value, to).unwrap(), "{text}");
        }
    }
    let mut out = Vec::new();
    for text in ["", "3", "[]", "null", "\"{\""] {
        let refused = convert_text(text, Version::V1, &mut out, &mut Vec::new());
        assert_eq!(refused, Err(ConvertError::NotAnObject), "{text}");
    }
    let cut = convert_text(r#"{"a":"#, Version::V1, &mut out, &mut Vec::new());
    assert!(matches!(cut, Err(ConvertError::Unreadable(_))), "{cut:?}");
}
