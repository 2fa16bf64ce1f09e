package inject

import (
	"encoding/json"
	"reflect"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/yaml"

	"github.com/hanse-mesh/hanse/discovery/kube"
	"github.com/hanse-mesh/hanse/proxy/probe"
)

func values(t *testing.T) *Values {
	t.Helper()
	v := &Values{Cluster: "west", TrustDomain: "west.demo", Image: "hanse.mesh/hanse-proxy:v1", Version: "v1"}
	if err := v.Complete(); err != nil {
		t.Fatal(err)
	}
	return v
}

func podOf() (*metav1.ObjectMeta, *corev1.PodSpec) {
	return &metav1.ObjectMeta{Name: "app"}, &corev1.PodSpec{
		InitContainers: []corev1.Container{{Name: "migrate", Image: "x"}},
		Containers: []corev1.Container{{Name: "app", Image: "x", Ports: []corev1.ContainerPort{{Name: "web", ContainerPort: 8080}},
			LivenessProbe:  &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "healthz", Port: intstr.FromString("web"), HTTPHeaders: []corev1.HTTPHeader{{Name: "Host", Value: "a"}}}}, PeriodSeconds: 7},
			ReadinessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(9090)}}},
			Lifecycle: &corev1.Lifecycle{PostStart: &corev1.LifecycleHandler{Exec: &corev1.ExecAction{Command: []string{"true"}}},
				PreStop: &corev1.LifecycleHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/drain", Port: intstr.FromString("web")}}},
			StartupProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{GRPC: &corev1.GRPCAction{Port: 7070, Service: ptr("s")}}},
		}, {Name: "helper", Image: "y", LivenessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"true"}}}},
			ReadinessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Host: "other", Port: intstr.FromInt32(1)}}}}},
	}
}

func TestPod(t *testing.T) {
	meta, spec := podOf()
	if err := values(t).Pod(meta, spec); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, c := range spec.InitContainers {
		names = append(names, c.Name)
	}
	if !slices.Equal(names, []string{"hanse-capture", "hanse-proxy", "migrate"}) {
		t.Fatalf("init containers %v: the sidecar must be there before any other runs", names)
	}
	capture, proxy := spec.InitContainers[0], spec.InitContainers[1]
	if capture.RestartPolicy != nil || proxy.RestartPolicy == nil || *proxy.RestartPolicy != corev1.ContainerRestartPolicyAlways || proxy.StartupProbe == nil {
		t.Error("the sidecar is not a native one that the application waits for")
	}
	// Restricted Pod Security, field by field.
	if s := proxy.SecurityContext; !*s.RunAsNonRoot || *s.RunAsUser != 1503 || *s.AllowPrivilegeEscalation || len(s.Capabilities.Add) > 0 || s.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
		t.Errorf("the sidecar's security context is %+v", s)
	}
	if s := capture.SecurityContext; !slices.Equal(s.Capabilities.Add, []corev1.Capability{"NET_ADMIN"}) || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) || *s.AllowPrivilegeEscalation {
		t.Errorf("the capture container's security context is %+v", s)
	}
	app, helper := spec.Containers[0], spec.Containers[1]
	for kind, p := range map[string]*corev1.Probe{"liveness": app.LivenessProbe, "readiness": app.ReadinessProbe, "startup": app.StartupProbe} {
		if p.HTTPGet == nil || p.HTTPGet.Path != "/check/app/"+kind || p.HTTPGet.Port.IntVal != 15021 || p.TCPSocket != nil || p.GRPC != nil {
			t.Errorf("%s probe: %+v", kind, p.ProbeHandler)
		}
	}
	if app.LivenessProbe.PeriodSeconds != 7 || helper.LivenessProbe.Exec == nil || helper.ReadinessProbe.HTTPGet.Host != "other" {
		t.Error("what was not to be rewritten is")
	}
	if meta.Annotations[kube.SidecarAnnotation] != "v1" {
		t.Error("discovery is not told of the sidecar")
	}
	var c proxyConfig
	if err := yaml.UnmarshalStrict([]byte(meta.Annotations[annotationConfig]), &c); err != nil {
		t.Fatal(err)
	}
	want := map[string]probe.Check{"/check/app/liveness": {HTTP: &probe.HTTP{Port: 8080, Path: "/healthz", Headers: [][2]string{{"Host", "a"}}}},
		"/check/app/readiness": {TCP: &probe.TCP{Port: 9090}}, "/check/app/startup": {GRPC: &probe.GRPC{Port: 7070, Service: "s"}},
		"/hook/app/pre-stop": {HTTP: &probe.HTTP{Port: 8080, Path: "/drain"}, Hook: true}}
	if a, b := mustJSON(t, c.Health.Checks), mustJSON(t, want); a != b {
		t.Errorf("checks %s, want %s", a, b)
	}
	if h := app.Lifecycle.PreStop.HTTPGet; h.Path != "/hook/app/pre-stop" || h.Port.IntVal != 15021 || !c.Health.Checks["/hook/app/pre-stop"].Hook || app.Lifecycle.PostStart.Exec == nil {
		t.Errorf("hooks: %+v", app.Lifecycle)
	}
	mounts := map[string]bool{}
	for _, v := range spec.Volumes {
		mounts[v.Name] = true
	}
	for _, m := range slices.Concat(capture.VolumeMounts, proxy.VolumeMounts) {
		if !mounts[m.Name] {
			t.Errorf("volume %s is mounted and not there", m.Name)
		}
	}
}

// With capture from the node no container of the Pod needs more than Pod Security "restricted" permits.
func TestCaptureOnNode(t *testing.T) {
	meta, spec := podOf()
	v := values(t)
	v.Capture = CaptureOnNode
	if err := v.Pod(meta, spec); err != nil {
		t.Fatal(err)
	}
	for _, c := range spec.InitContainers[:2] {
		s := c.SecurityContext
		if !*s.RunAsNonRoot || *s.RunAsUser == 0 || *s.AllowPrivilegeEscalation || len(s.Capabilities.Add) > 0 || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) || s.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
			t.Errorf("%s: security context %+v", c.Name, s)
		}
	}
	if wait := spec.InitContainers[0]; wait.Args[1] != "wait" || *wait.SecurityContext.RunAsUser == user {
		t.Errorf("%v as user %d: the sidecar's own connections are not captured", wait.Args, *wait.SecurityContext.RunAsUser)
	}
	if err := (&Values{Cluster: "west", TrustDomain: "west.demo", Image: "x", KeyCurve: "P-521"}).Complete(); err == nil || !strings.Contains(err.Error(), `keyCurve: "P-521" is not one of P-256, P-384`) {
		t.Errorf("%v", err)
	}
	if err := (&Values{Cluster: "west", TrustDomain: "west.demo", Image: "x", Capture: "cloud"}).Complete(); err == nil || !strings.Contains(err.Error(), `capture: "cloud": want pod or node`) {
		t.Errorf("%v", err)
	}
}

func mustJSON(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestSettings(t *testing.T) {
	meta, spec := podOf()
	meta.Annotations = map[string]string{
		"hanse.mesh/proxy-log-level": "debug", "hanse.mesh/proxy-memory": "64Mi", "hanse.mesh/proxy-cpu-limit": "2", "hanse.mesh/proxy-image": "other:1",
		"hanse.mesh/capture-inbound-mode": "permissive", "hanse.mesh/capture-exempt-ports": "9100", "hanse.mesh/capture-exclude-outbound-ports": "3306, 9000-9100",
		"hanse.mesh/capture-exclude-inbound-ports": "7000", "hanse.mesh/capture-exclude-outbound-cidrs": "10.9.0.0/16", "hanse.mesh/workload-api": "true",
	}
	if err := values(t).Pod(meta, spec); err != nil {
		t.Fatal(err)
	}
	proxy := spec.InitContainers[1]
	if q := proxy.Resources.Requests[corev1.ResourceMemory]; q.Cmp(resource.MustParse("64Mi")) != 0 || proxy.Image != "other:1" {
		t.Errorf("resources %+v, image %s", proxy.Resources, proxy.Image)
	}
	config := meta.Annotations[annotationConfig]
	for _, want := range []string{"mode: permissive", "- 9100\n", "- 9000-9100", `- "3306"`, `- "22"`, `- "7000"`, "10.9.0.0/16", "level: debug", "socket: /run/hanse-workload-api/workload.sock", "socketUsers: any"} {
		if !strings.Contains(config, want) {
			t.Errorf("the configuration lacks %q:\n%s", want, config)
		}
	}
	if app := spec.Containers[0]; app.Env[0].Name != "SPIFFE_ENDPOINT_SOCKET" || app.VolumeMounts[0].Name != "hanse-workload-api" {
		t.Error("the application has no Workload API")
	}
}

// TestOnSPIRE: the sidecar has its identity from the agent of the node, and needs neither token nor trust bundle; the application that asks for the
// Workload API gets the agent's.
func TestOnSPIRE(t *testing.T) {
	for name, c := range map[string]struct {
		from SPIRE
		want corev1.VolumeSource
	}{
		"csi":  {SPIRE{CSIDriver: "csi.spiffe.io"}, corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{Driver: "csi.spiffe.io", ReadOnly: ptr(true)}}},
		"path": {SPIRE{HostPath: "/run/spire", Socket: "api.sock"}, corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/run/spire", Type: ptr(corev1.HostPathDirectory)}}},
	} {
		v := Values{Cluster: "west", TrustDomain: "west.demo", Image: "x", SPIRE: c.from, KeyCurve: "P-384"}
		if err := v.Complete(); err != nil {
			t.Fatal(err)
		}
		meta, spec := podOf()
		meta.Annotations = map[string]string{"hanse.mesh/workload-api": "true"}
		if err := v.Pod(meta, spec); err != nil {
			t.Fatal(err)
		}
		socket := "unix:///run/hanse-workload-api/" + v.SPIRE.Socket
		if config := meta.Annotations[annotationConfig]; !strings.Contains(config, "workloadAPI: "+socket) || !strings.Contains(config, "socket: none") || strings.Contains(config, "7444") || strings.Contains(config, "Token") || strings.Contains(config, "curve") {
			t.Errorf("%s: configuration\n%s", name, config)
		}
		var volumes []string
		for _, x := range spec.Volumes {
			volumes = append(volumes, x.Name)
			if x.Name == volumeAPI && !reflect.DeepEqual(x.VolumeSource, c.want) {
				t.Errorf("%s: volume %+v", name, x.VolumeSource)
			}
		}
		if slices.Contains(volumes, volumeRoot) || slices.Contains(volumes, volumeToken) || !slices.Contains(volumes, volumeAPI) {
			t.Errorf("%s: volumes %v", name, volumes)
		}
		for _, c := range []corev1.Container{spec.InitContainers[1], spec.Containers[0]} {
			if !slices.Contains(c.VolumeMounts, corev1.VolumeMount{Name: volumeAPI, MountPath: apiDir, ReadOnly: true}) {
				t.Errorf("%s: container %s has not the socket: %+v", name, c.Name, c.VolumeMounts)
			}
		}
		if e := spec.Containers[0].Env; len(e) != 1 || e[0].Value != socket {
			t.Errorf("%s: environment %+v", name, e)
		}
	}
	for want, from := range map[string]SPIRE{"exclude": {CSIDriver: "a", HostPath: "/b"}, "spire.hostPath": {HostPath: "/"}, "spire.socket": {CSIDriver: "a", Socket: "../b"}, "says nothing": {Socket: "x"}} {
		v := Values{Cluster: "west", TrustDomain: "west.demo", Image: "x", SPIRE: from}
		if err := v.Complete(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %q in it", from, err, want)
		}
	}
}

// What is wrong with a Pod is told with annotation or field and value, all at once, and the Pod stays as it was.
func TestRefused(t *testing.T) {
	meta, spec := podOf()
	meta.Annotations = map[string]string{"hanse.mesh/proxy-cpu": "much", "hanse.mesh/capture-inbound-mode": "lax", "hanse.mesh/proxy-colour": "red",
		"hanse.mesh/capture-exempt-ports": "0", "hanse.mesh/capture-exclude-outbound-ports": "9-2", "hanse.mesh/capture-exclude-outbound-cidrs": "10.0.0.1", "hanse.mesh/proxy-config": "x"}
	spec.Containers[0].SecurityContext = &corev1.SecurityContext{RunAsUser: ptr(int64(1503))}
	spec.Containers[1].Name = "hanse-proxy"
	spec.Containers[1].Ports = []corev1.ContainerPort{{ContainerPort: 15008}}
	spec.Volumes = []corev1.Volume{{Name: "hanse-root"}}
	before := mustJSON(t, spec)
	err := values(t).Pod(meta, spec)
	if err == nil {
		t.Fatal("no fault was found")
	}
	for _, want := range []string{`hanse.mesh/proxy-cpu: "much"`, `hanse.mesh/capture-inbound-mode: "lax"`, "hanse.mesh/proxy-colour", `"0" is not a port`, `"9-2" is not a port or a range`, `"10.0.0.1" is not a range`,
		"hanse.mesh/proxy-config", "runAsUser: 1503", "container hanse-proxy: the name", "port 15008", "volume hanse-root"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not say %q:\n%v", want, err)
		}
	}
	if mustJSON(t, spec) != before {
		t.Error("the Pod was changed")
	}
}

func TestWanted(t *testing.T) {
	on := map[string]string{Label: "enabled"}
	for name, c := range map[string]struct {
		namespace map[string]string
		change    func(*metav1.ObjectMeta, *corev1.PodSpec)
		yes, bad  bool
	}{
		"namespace":             {namespace: on, yes: true},
		"nobody":                {},
		"opted out by label":    {namespace: on, change: func(m *metav1.ObjectMeta, _ *corev1.PodSpec) { m.Labels = map[string]string{Label: "disabled"} }},
		"opted out, annotation": {namespace: on, change: func(m *metav1.ObjectMeta, _ *corev1.PodSpec) { m.Annotations = map[string]string{Label: "disabled"} }},
		"opted in":              {change: func(m *metav1.ObjectMeta, _ *corev1.PodSpec) { m.Labels = map[string]string{Label: "enabled"} }, yes: true},
		"misspelt":              {namespace: on, change: func(m *metav1.ObjectMeta, _ *corev1.PodSpec) { m.Labels = map[string]string{Label: "no"} }, bad: true},
		"namespace misspelt":    {namespace: map[string]string{Label: "yes"}, bad: true},
		"node's network":        {namespace: on, change: func(_ *metav1.ObjectMeta, s *corev1.PodSpec) { s.HostNetwork = true }},
		"Windows":               {namespace: on, change: func(_ *metav1.ObjectMeta, s *corev1.PodSpec) { s.OS = &corev1.PodOS{Name: corev1.Windows} }},
		"it has a sidecar": {namespace: on, change: func(m *metav1.ObjectMeta, _ *corev1.PodSpec) {
			m.Annotations = map[string]string{kube.SidecarAnnotation: "v0"}
		}},
		"the Pod wins over both": {namespace: map[string]string{Label: "disabled"}, change: func(m *metav1.ObjectMeta, _ *corev1.PodSpec) { m.Annotations = map[string]string{Label: "enabled"} }, yes: true},
	} {
		meta, spec := podOf()
		if c.change != nil {
			c.change(meta, spec)
		}
		yes, why, err := Wanted(c.namespace, meta, spec)
		if yes != c.yes || (err != nil) != c.bad || !yes && err == nil && why == "" {
			t.Errorf("%s: %v, %q, %v", name, yes, why, err)
		}
	}
}

const manifests = `# kept as it is
apiVersion: v1
kind: Service
metadata: {name: app} # this, too
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: app, namespace: shop}
spec:
  fieldOfTomorrow: 1
  template:
    spec:
      containers:
      - name: app
        image: x
        fieldOfTomorrow: {a: 1}
---
apiVersion: batch/v1
kind: CronJob
metadata: {name: nightly}
spec: {jobTemplate: {spec: {template: {metadata: {labels: {a: b}}, spec: {containers: [{name: job, image: img}]}}}}}
---
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Pod, metadata: {name: one, annotations: {hanse.mesh/inject: disabled}}, spec: {containers: [{name: a, image: z}]}}
- {apiVersion: v1, kind: Pod, metadata: {name: two}, spec: {containers: [{name: a, image: z}]}}
`

func TestFile(t *testing.T) {
	v := values(t)
	out, workloads, err := v.File([]byte(manifests))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, w := range workloads {
		got = append(got, w.Kind+"/"+w.Name+map[bool]string{true: "+", false: "-"}[w.Injected])
	}
	if want := []string{"Deployment/app+", "CronJob/nightly+", "Pod/one-", "Pod/two+"}; !slices.Equal(got, want) {
		t.Errorf("workloads %v, want %v", got, want)
	}
	text := string(out)
	if !strings.HasPrefix(text, manifests[:strings.Index(manifests, "---")]) {
		t.Errorf("what has no Pods was changed:\n%s", text[:200])
	}
	if strings.Count(text, "fieldOfTomorrow") != 2 || strings.Contains(text, "creationTimestamp") || strings.Contains(text, "status:") {
		t.Error("fields were lost, or invented")
	}
	if strings.Count(text, "name: hanse-capture") != 3 {
		t.Errorf("%d workloads have a sidecar, want 3", strings.Count(text, "name: hanse-capture"))
	}
	again, workloads, err := v.File(out)
	if err != nil || string(again) != text {
		t.Errorf("a second time changes something (%v)", err)
	}
	for _, w := range workloads {
		if w.Injected {
			t.Errorf("%s is injected twice", w.Name)
		}
	}
	if _, _, err := v.File([]byte("kind: Deployment\nmetadata: {name: d}\nspec: {}\n")); err == nil || !strings.Contains(err.Error(), "document 1: Deployment d: it has no template") {
		t.Errorf("a Deployment without template: %v", err)
	}
}

func FuzzFile(f *testing.F) {
	f.Add([]byte(manifests))
	f.Add([]byte("kind: Pod\nspec: {initContainers: [{}], containers: [{}]}\n"))
	v := &Values{Cluster: "west", TrustDomain: "west.demo", Image: "i"}
	if err := v.Complete(); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		out, _, err := v.File(data)
		if err != nil {
			return
		}
		if again, ws, err := v.File(out); err != nil {
			t.Fatalf("what came out is refused: %v\n%s", err, out)
		} else {
			for _, w := range ws {
				if w.Injected {
					t.Fatalf("%s %s is injected twice:\n%s", w.Kind, w.Name, again)
				}
			}
		}
	})
}
