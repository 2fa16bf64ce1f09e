{{- define "hanse.labels" -}}
app.kubernetes.io/part-of: hanse
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: hanse-{{ .Chart.Version }}
{{- end }}

{{- define "hanse.image" -}}
{{ .root.Values.images.registry }}/{{ .name }}:{{ .root.Values.images.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- define "hanse.network" -}}
{{ .Values.network | default .Values.cluster }}
{{- end }}

{{- /* etcds that are shared by replicas: there already, or the chart's own; none if hansed embeds it */ -}}
{{- define "hanse.etcdEndpoints" -}}
{{- $own := list }}
{{- range $i := until (int .Values.etcd.replicas) }}
{{- $own = append $own (printf "https://hanse-etcd-%d.hanse-etcd.%s.svc:2379" $i $.Release.Namespace) }}
{{- end }}
{{- toJson (default $own .Values.etcd.endpoints) }}
{{- end }}

{{- /* the chart's own etcd has one that "hanse install" makes, if none is given */ -}}
{{- define "hanse.etcdSecret" -}}
{{- if .Values.etcd.tlsSecret }}{{ .Values.etcd.tlsSecret }}{{ else if gt (int .Values.etcd.replicas) 0 }}hanse-etcd{{ end }}
{{- end }}

{{- define "hanse.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "hanse.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- /* the directory of the SPIRE agent's socket, as a volume */ -}}
{{- define "hanse.spireVolume" -}}
{{- with .Values.identity.spire }}
name: workload-api
{{- if .hostPath }}
hostPath: {path: {{ .hostPath }}, type: Directory}
{{- else }}
csi: {driver: {{ .csiDriver }}, readOnly: true}
{{- end }}
{{- end }}
{{- end }}

{{- define "hanse.spireSocket" -}}
unix:///run/hanse-workload-api/{{ .Values.identity.spire.socket }}
{{- end }}

{{- /* hansed.yaml, without what people add */ -}}
{{- define "hanse.config" -}}
cluster: {{ .Values.cluster }}
trustDomain: {{ .Values.trustDomain }}
mesh: {{ .Values.mesh }}
{{- with .Values.region }}
region: {{ . }}
{{- end }}
network: {{ include "hanse.network" . }}
{{- with .Values.labels }}
labels: {{ toJson . }}
{{- end }}
{{- with .Values.gateway.addresses }}
gateways: {{ toJson . }}
{{- end }}
dataDir: /var/lib/hanse/data
socket: /run/hanse/hansed.sock
kubeAPI:
  enabled: true
  {{- if .Values.gateway.enabled }}
  gatewayService: {{ .Release.Namespace }}/hanse-gateway
  {{- end }}
  {{- if not .Values.federation.advertise }}
  federationService: {{ .Release.Namespace }}/hanse-federation
  {{- end }}
  {{- if .Values.webhooks.enabled }}
  webhook:
    listen: ":7448"
    service: hansed.{{ .Release.Namespace }}
    inject:
      image: {{ include "hanse.image" (dict "root" . "name" "hanse-proxy") }}
      imagePullPolicy: {{ .Values.images.pullPolicy }}
      capture: {{ .Values.capture.mode }}
      {{- if .Values.identity.spire.server }}
      spire: {{ toJson (pick .Values.identity.spire (ternary "hostPath" "csiDriver" (ne .Values.identity.spire.hostPath "")) "socket") }}
      {{- else }}
      keyCurve: {{ .Values.identity.proxyKeys.curve }}
      identity: ["hansed.{{ .Release.Namespace }}.svc:7444"]
      {{- end }}
      xds: ["hansed.{{ .Release.Namespace }}.svc:7445"]
  {{- end }}
identity:
  {{- with .Values.identity.spire }}
  {{- if .server }}
  spire:
    server: {{ .server }}
    workloadAPI: {{ include "hanse.spireSocket" $ }}
    bundleEndpoint: hansed.{{ $.Release.Namespace }}.svc:7446
    gateways:
    - {parent: {{ quote .parent }}, selectors: ["k8s:ns:{{ $.Release.Namespace }}", "k8s:sa:hanse-gateway"]}
    entries:
    - {parent: {{ quote .parent }}, selectors: ["k8s:ns:{{ "{{.Namespace}}" }}", "k8s:sa:{{ "{{.ServiceAccount}}" }}"]}
  {{- else }}
  keys: {{ toJson $.Values.identity.keys }}
  kubernetes:
    cluster: {{ $.Values.cluster }}
    gateways: ["{{ $.Release.Namespace }}:hanse-gateway"]
  {{- end }}
  {{- end }}
federation:
  listen: ":7443"
  {{- with .Values.federation.advertise }}
  advertise: {{ toJson . }}
  {{- end }}
health:
  listen: ":7441"
  metrics: {{ .Values.metrics.enabled }}
{{- with fromJsonArray (include "hanse.etcdEndpoints" .) }}
etcd:
  endpoints: {{ toJson . }}
  {{- if include "hanse.etcdSecret" $ }}
  certFile: /etc/hanse/etcd/tls.crt
  keyFile: /etc/hanse/etcd/tls.key
  caFile: /etc/hanse/etcd/ca.crt
  {{- end }}
{{- end }}
log: {level: {{ .Values.hansed.logLevel }}}
{{- end }}
