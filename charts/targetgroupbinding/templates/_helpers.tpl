{{/* Names: a Service's may have no dots and starts with a letter. */}}
{{- define "tgb.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimAll "-_." -}}
{{- end }}
{{- define "tgb.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := .Values.fullnameOverride -}}
{{- if not $full }}{{ $full = ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) }}{{ end -}}
{{- $full = regexReplaceAll "[^a-z0-9]+" (lower $full) "-" | trunc 40 | trimAll "-" -}}
{{- if not (regexMatch "^[a-z]" $full) }}{{ $full = printf "tgb-%s" $full | trunc 40 | trimAll "-" }}{{ end -}}
{{- $full -}}
{{- end }}

{{/* A value as text. Numbers of a values file are floats, 1000000 being 1e+06; `off` is YAML's false. */}}
{{- define "tgb.text" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) }}{{ printf "%.0f" . }}{{ else }}{{ toString . }}{{ end -}}
{{- end }}
{{- define "tgb.word" -}}
{{- if kindIs "bool" . }}{{ ternary "on" "off" . }}{{ else }}{{ toString . }}{{ end -}}
{{- end }}

{{/* A map of texts, for labels, annotations and node selectors. */}}
{{- define "tgb.texts" -}}
{{- $texts := dict -}}
{{- range $key, $value := . }}{{ $_ := set $texts $key (include "tgb.text" $value) }}{{ end -}}
{{- toYaml $texts -}}
{{- end }}

{{- define "tgb.webhook" -}}{{ include "tgb.fullname" . }}-webhook{{- end }}
{{- define "tgb.controller" -}}{{ include "tgb.fullname" . }}-controller{{- end }}
{{- define "tgb.webhook.account" -}}{{ default (include "tgb.webhook" .) .Values.webhook.serviceAccount.name }}{{- end }}
{{- define "tgb.controller.account" -}}{{ default (include "tgb.controller" .) .Values.controller.serviceAccount.name }}{{- end }}
{{- define "tgb.lease.name" -}}{{ default (include "tgb.controller" .) .Values.controller.lease.name }}{{- end }}
{{- define "tgb.lease.namespace" -}}{{ default .Release.Namespace .Values.controller.lease.namespace }}{{- end }}
{{- define "tgb.caSecret" -}}{{ include "tgb.webhook" . }}-ca{{- end }}
{{- define "tgb.authority" -}}{{ include "tgb.webhook" . }}-authority{{- end }}
{{- define "tgb.tlsSecret" -}}
{{- if eq .Values.webhook.tls.mode "files" -}}
{{- required "webhook.tls.secretName: mode `files` needs the name of a Secret with tls.crt and tls.key" .Values.webhook.tls.secretName -}}
{{- else -}}
{{ include "tgb.webhook" . }}-tls
{{- end -}}
{{- end }}
{{- define "tgb.crd" -}}targetgroupbindings.elbv2.k8s.aws{{- end }}

{{/* Runs the webhook in the cluster? */}}
{{- define "tgb.webhook.inside" -}}
{{- if and .Values.webhook.enabled (not .Values.webhook.url) }}true{{ end -}}
{{- end }}

{{/* Labels; the argument of the three below is (list $ "component") */}}
{{- define "tgb.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "tgb.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
{{- with index . 1 }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end }}

{{/* The chart's own labels win. */}}
{{- define "tgb.labels" -}}
{{- $root := index . 0 -}}
{{- $own := include "tgb.selector" . | fromYaml -}}
{{- $_ := set $own "app.kubernetes.io/version" $root.Chart.AppVersion -}}
{{- $_ := set $own "app.kubernetes.io/managed-by" $root.Release.Service -}}
{{- $_ := set $own "helm.sh/chart" (printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 | trimAll "-_.") -}}
{{- include "tgb.texts" (merge $own $root.Values.commonLabels) -}}
{{- end }}

{{/* The same and more: (list $ "component" labels) */}}
{{- define "tgb.labels.and" -}}
{{- include "tgb.texts" (merge (include "tgb.labels" . | fromYaml) (index . 2)) -}}
{{- end }}

{{- define "tgb.image" -}}
{{- $root := index . 0 -}}{{- $image := (index $root.Values (index . 1)).image -}}
{{- $name := $image.repository -}}
{{- if $root.Values.image.registry }}{{ $name = printf "%s/%s" (trimSuffix "/" $root.Values.image.registry) $name }}{{ end -}}
{{- if $image.digest -}}
{{ printf "%s@%s" $name $image.digest }}
{{- else -}}
{{ printf "%s:%s" $name (default $root.Chart.AppVersion $image.tag) }}
{{- end -}}
{{- end }}

{{/* How the API server reaches a path of the webhook: (list $ "/path") */}}
{{- define "tgb.clientConfig" -}}
{{- $root := index . 0 -}}
{{- if $root.Values.webhook.url -}}
url: {{ printf "%s%s" (trimSuffix "/" $root.Values.webhook.url) (index . 1) | quote }}
{{- else -}}
service:
  name: {{ include "tgb.webhook" $root }}
  namespace: {{ $root.Release.Namespace }}
  path: {{ index . 1 }}
  port: {{ $root.Values.webhook.service.port }}
{{- end }}
{{- if and $root.Values.webhook.url (eq $root.Values.webhook.tls.mode "files") $root.Values.webhook.tls.caBundle }}
caBundle: {{ $root.Values.webhook.tls.caBundle | b64enc }}
{{- end }}
{{- end }}

{{/*
Where the webhook finds the authority that it publishes, if that is in a file. It adds it to what the API server trusts already
and takes the other one away later; Helm or cert-manager's injector would replace it, while pods still serve the old one.
*/}}
{{- define "tgb.authorityFile" -}}
{{- if eq .Values.webhook.tls.mode "cert-manager" -}}
/tls/ca.crt
{{- else if and (eq .Values.webhook.tls.mode "files") .Values.webhook.tls.caBundle -}}
/authority/ca.crt
{{- end -}}
{{- end }}

{{/* Bindings of which namespaces? */}}
{{- define "tgb.namespaceSelector" -}}
{{- if .Values.watchNamespaces -}}
matchExpressions:
- {key: kubernetes.io/metadata.name, operator: In, values: {{ toJson .Values.watchNamespaces }}}
{{- else -}}
{}
{{- end -}}
{{- end }}

{{/* One flag of a program, if its value is set: (list "name" value). Lists and maps are joined by commas. */}}
{{- define "tgb.flag" -}}
{{- $name := index . 0 -}}{{- $value := index . 1 -}}
{{- if kindIs "bool" $value -}}
{{- if $value }}
- --{{ $name }}
{{- end -}}
{{- else if kindIs "slice" $value -}}
{{- with $value }}
- {{ printf "--%s=%s" $name (join "," .) | quote }}
{{- end -}}
{{- else if kindIs "map" $value -}}
{{- if $value -}}
{{- $pairs := list -}}
{{- range $k, $v := $value }}{{ $pairs = append $pairs (printf "%s=%s" $k (include "tgb.word" $v)) }}{{ end }}
- {{ printf "--%s=%s" $name (join "," $pairs) | quote }}
{{- end -}}
{{- else if and (not (kindIs "invalid" $value)) (ne (toString $value) "") }}
- {{ printf "--%s=%s" $name (include "tgb.text" $value) | quote }}
{{- end -}}
{{- end }}

{{/* Flags of both programs */}}
{{- define "tgb.commonFlags" -}}
{{- include "tgb.flag" (list "cluster-name" .Values.clusterName) }}
{{- include "tgb.flag" (list "aws-region" .Values.aws.region) }}
{{- include "tgb.flag" (list "aws-vpc-id" .Values.aws.vpcID) }}
{{- include "tgb.flag" (list "watch-namespaces" .Values.watchNamespaces) }}
{{- include "tgb.flag" (list "assume-role-allow" .Values.policy.assumeRoleAllow) }}
{{- include "tgb.flag" (list "require-target-group-tag" .Values.policy.requireTargetGroupTags) }}
{{- include "tgb.flag" (list "namespace-binding-tag" .Values.policy.namespaceBindingTag) }}
{{- include "tgb.flag" (list "log-format" .Values.logging.format) }}
{{- include "tgb.flag" (list "log-level" (include "tgb.word" .Values.logging.level)) }}
{{- include "tgb.flag" (list "otlp-endpoint" .Values.logging.otlpEndpoint) }}
{{- end }}

{{/* Security contexts that pass the level `restricted` */}}
{{- define "tgb.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}
{{- define "tgb.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Where the pods of a Deployment run: (list $ "webhook") */}}
{{- define "tgb.placement" -}}
{{- $root := index . 0 -}}{{- $v := index $root.Values (index . 1) -}}
{{- with $v.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
hostNetwork: {{ $v.hostNetwork }}
dnsPolicy: {{ default (ternary "ClusterFirstWithHostNet" "ClusterFirst" $v.hostNetwork) $v.dnsPolicy }}
terminationGracePeriodSeconds: {{ include "tgb.text" $v.terminationGracePeriodSeconds }}
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
- name: {{ . }}
{{- end }}
{{- end }}
{{- with $v.nodeSelector }}
nodeSelector: {{- include "tgb.texts" . | nindent 2 }}
{{- end }}
{{- with $v.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $v.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
{{- if $v.topologySpreadConstraints }}
{{ toYaml $v.topologySpreadConstraints }}
{{- else }}
{{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
- maxSkew: 1
  topologyKey: {{ . }}
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels: {{- include "tgb.selector" (list $root (index $ 1)) | nindent 6 }}
  matchLabelKeys: [pod-template-hash]
{{- end }}
{{- end }}
{{- end }}

{{/* Environment variables, whose values are texts. */}}
{{- define "tgb.env" -}}
{{- $all := list -}}
{{- range . }}
{{- $one := deepCopy . -}}
{{- if hasKey $one "value" }}{{ $_ := set $one "value" (include "tgb.text" $one.value) }}{{ end -}}
{{- $all = append $all $one -}}
{{- end -}}
{{- toYaml $all -}}
{{- end }}

{{/* What can't be said in the schema */}}
{{- define "tgb.check" -}}
{{- if and .Values.controller.enabled (not .Values.clusterName) }}
{{- fail "clusterName: the controller needs the name of the cluster (--set clusterName=…, as in `aws eks list-clusters`)" }}
{{- end }}
{{- if and .Values.crd.enabled (not .Values.webhook.enabled) }}
{{- fail "webhook.enabled=false: the CRD serves several versions and can't do without the webhook's /convert; set webhook.url for a webhook outside the cluster, or crd.enabled=false if another release owns the CRD" }}
{{- end }}
{{- if and .Values.watchNamespaces (not .Values.ruleOwner) .Values.controller.enabled }}
{{- fail "ruleOwner: with watchNamespaces the security group rules of this installation need a name of their own" }}
{{- end }}
{{- if eq (int .Values.webhook.port) (int .Values.webhook.httpPort) }}
{{- fail "webhook.httpPort: it is webhook.port; the two servers need a port each" }}
{{- end }}
{{- $hosts := and .Values.webhook.hostNetwork .Values.controller.hostNetwork .Values.controller.enabled (include "tgb.webhook.inside" .) }}
{{- if and $hosts (has (int .Values.controller.httpPort) (list (int .Values.webhook.port) (int .Values.webhook.httpPort))) }}
{{- fail "controller.httpPort: on the nodes' network it must differ from webhook.port and webhook.httpPort" }}
{{- end }}
{{- if and (eq .Values.webhook.tls.mode "cert-manager") .Values.webhook.url }}
{{- fail "webhook.url: cert-manager can't issue for a webhook outside the cluster; use webhook.tls.mode=self or files" }}
{{- end }}
{{- end }}
