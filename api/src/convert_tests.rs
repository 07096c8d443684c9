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

    fn spec_old(&mut self) -> Value {
        self.object_with(
            &[("serviceRef", Self::service_ref)],
            &[
                ("targetGroupARN", Self::text),
                ("targetGroupName", Self::text),
                ("targetType", |r| r.word(TARGET_TYPES)),
                ("multiClusterTargetGroup", |r| r.half().into()),
                ("iamRoleArnToAssume", Self::text),
                ("assumeRoleExternalId", Self::text),
                ("networking", Self::networking),
                ("targetGroupProtocol", |r| r.word(PROTOCOLS)),
                ("ipAddressType", |r| r.word(IP_ADDRESS_TYPES)),
                ("vpcID", Self::text),
                ("nodeSelector", Self::node_selector),
            ],
        )
    }

    fn metadata(&mut self) -> Value {
        self.object(&[
            ("name", Self::text),
            ("namespace", Self::text),
            ("labels", Self::labels),
            ("annotations", Self::labels),
            (
                "managedFields",
                |_| json!([{"manager": "m", "fieldsV1": {"f:spec": {"f:targetGroupARN": {}, "k": null}}}]),
            ),
            ("creationTimestamp", |r| if r.half() { Value::Null } else { r.time() }),
        ])
    }

    fn binding(&mut self, version: Version) -> Value {
        let mut made = Value::Object(self.unknown());
        made["apiVersion"] = version.api_version().into();
        made["kind"] = names::KIND.into();
        made["metadata"] = self.metadata();
        // Partial objects, as managedFields are made of, lack spec or status.
        if self.0.u8(..8) > 0 {
            made["spec"] = match version {
                Version::V1 => self.spec_v1(),
                Version::V1Beta1 | Version::V1Alpha1 => self.spec_old(),
            };
        }
        if self.half() {
            made["status"] = self.status();
        }
        made
    }
}

/// There and back, each time from text.
fn round(object: Value, by: Version) -> Value {
    let from = Version::of_api_version(object["apiVersion"].as_str().unwrap()).unwrap();
    let step = |object: Value, to| convert(json::read(&object.to_string()).unwrap(), to).unwrap();
    let there = step(object, by);
    assert_eq!(there["apiVersion"], by.api_version());
    step(there, from)
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
fn an_edit_in_an_old_version_wins() {
    prove(|random| {
        let version = if random.half() { Version::V1Beta1 } else { Version::V1Alpha1 };
        let mut old = convert(random.binding(Version::V1), version).unwrap();
        old["spec"] = random.spec_old();
        assert_eq!(round(old.clone(), Version::V1), old);
    });
}

#[test]
fn v1alpha1_is_v1beta1_by_another_name() {
    prove(|random| {
        let object = random.binding(Version::V1);
        let mut alpha = convert(object.clone(), Version::V1Alpha1).unwrap();
        alpha["apiVersion"] = Version::V1Beta1.api_version().into();
        assert_eq!(alpha, convert(object, Version::V1Beta1).unwrap());
    });
}

/// Annotations and labels are the user's, whatever they are called: nothing of them becomes spec or status.
#[test]
fn conversion_never_changes_metadata_and_takes_nothing_from_it() {
    prove(|random| {
        for from in Version::ALL {
            let object = random.binding(from);
            let mut bare = object.clone();
            bare["metadata"] = json!({});
            for to in Version::ALL {
                let mut new = convert(object.clone(), to).unwrap();
                assert_eq!(new["metadata"], object["metadata"]);
                new["metadata"] = json!({});
                assert_eq!(new, convert(bare.clone(), to).unwrap());
            }
        }
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
            assert_eq!(there["metadata"], json!({}));
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
fn a_patch_keeps_its_nulls_and_directives_and_says_what_it_cannot_say() {
    let patch = |version: &str, spec: Value| json!({"apiVersion": format!("elbv2.k8s.aws/{version}"), "kind": "TargetGroupBinding", "spec": spec});
    let old = json!({"targetGroupName": null, "targetGroupARN": "a", "multiClusterTargetGroup": true,
        "networking": null, "$patch": "replace"});
    let new = json!({"targetGroup": {"name": null, "arn": "a", "sharing": "Shared"}, "networking": null,
        "$patch": "replace"});
    assert_eq!(convert_patch(patch("v1beta1", old.clone()), Version::V1), Ok(patch("v1", new.clone())));
    assert_eq!(convert_patch(patch("v1", new), Version::V1Beta1), Ok(patch("v1beta1", old)));
    for (spec, whole) in [
        (json!({"targetGroup": null}), "spec.targetGroup"),
        (json!({"targetGroup": {"$patch": "delete"}}), "spec.targetGroup"),
        (json!({"targetGroup": {"assumeRole": null}}), "spec.targetGroup.assumeRole"),
        (json!({"$retainKeys": ["serviceRef"]}), "spec"),
    ] {
        let refused = convert_patch(patch("v1", spec), Version::V1Beta1);
        assert_eq!(refused, Err(ConvertError::Whole(whole)));
    }
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
fn a_kind_or_version_that_is_not_known_is_named() {
    let mut other = v1(json!({}));
    other["kind"] = "Pod".into();
    assert_eq!(convert(other, Version::V1Beta1), Err(ConvertError::UnknownKind("Pod".to_owned())));
    let mut other = v1(json!({}));
    other["apiVersion"] = "elbv2.k8s.aws/v7".into();
    let unknown = ConvertError::UnknownVersion("elbv2.k8s.aws/v7".to_owned());
    assert_eq!(convert(other, Version::V1Beta1), Err(unknown));
    assert_eq!(convert(json!(3), Version::V1), Err(ConvertError::NotAnObject));
}

#[test]
fn from_text_to_text_is_the_same_conversion() {
    prove(|random| {
        for from in Version::ALL {
            let object = random.binding(from);
            for to in Version::ALL {
                let mut out = Vec::new();
                let had = convert_text(&format!(" {object:#}"), to, &mut out).unwrap();
                assert_eq!(had, from);
                let converted = convert(object.clone(), to).unwrap();
                assert_eq!(json::read(std::str::from_utf8(&out).unwrap()).unwrap(), converted);
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
            convert_text(&text, to, &mut out).unwrap();
            let value = serde_json::from_str(&text).unwrap();
            assert_eq!(serde_json::from_slice::<Value>(&out).unwrap(), convert(value, to).unwrap(), "{text}");
        }
    }
    let mut out = Vec::new();
    for text in ["", "3", "[]", "null", "\"{\""] {
        let refused = convert_text(text, Version::V1, &mut out);
        assert_eq!(refused, Err(ConvertError::NotAnObject), "{text}");
    }
    let cut = convert_text(r#"{"a":"#, Version::V1, &mut out);
    assert!(matches!(cut, Err(ConvertError::Unreadable(_))), "{cut:?}");
}
