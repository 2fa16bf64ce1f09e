package chart

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/mcs-api/config/crd"
	"sigs.k8s.io/yaml"
)

var update = flag.Bool("update", false, "write deploy/manifests/hanse.yaml")

const top = "../../../"

func west(more ...string) Options {
	v, err := Merge(nil, append([]string{"cluster=west", "trustDomain=west.example"}, more...))
	if err != nil {
		panic(err)
	}
	return Options{Values: v}
}

func render(t *testing.T, o Options) []*unstructured.Unstructured {
	t.Helper()
	all, err := Objects(o)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func find(t *testing.T, all []*unstructured.Unstructured, kind, name string) *unstructured.Unstructured {
	t.Helper()
	for _, o := range all {
		if o.GetKind() == kind && o.GetName() == name {
			return o
		}
	}
	t.Fatalf("no %s %s", kind, name)
	return nil
}

// The plain manifests are the chart's, and no hand has changed them.
func TestManifestsAreTheCharts(t *testing.T) {
	values, err := os.ReadFile(top + "deploy/manifests/values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	v, err := Merge([][]byte{values}, nil)
	if err != nil {
		t.Fatal(err)
	}
	got, err := YAML(render(t, Options{Values: v}))
	if err != nil {
		t.Fatal(err)
	}
	got = append([]byte("# Rendered from deploy/chart/hanse with values.yaml beside this file by `make manifests`. kubectl apply --server-side -f hanse.yaml\n"), got...)
	const file = top + "deploy/manifests/hanse.yaml"
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(file)
	if err != nil || !bytes.Equal(have, got) {
		t.Fatalf("%s is not what the chart renders (%v): run make manifests", file, err)
	}
}

// every combination of values that changes which objects there are.
var variants = map[string][]string{
	"default":   nil,
	"webhooks":  {"webhooks.enabled=true"},
	"bare":      {"webhooks.enabled=false", "gateway.enabled=false", "networkPolicy.enabled=false", "mcs.crds=false", "spire.crds=false", "podDisruptionBudget.enabled=false", "hansed.persistence.enabled=false"},
	"replicas":  {"hansed.replicas=3", "etcd.endpoints={https://etcd-0:2379,https://etcd-1:2379}", "etcd.tlsSecret=etcd"},
	"etcd":      {"hansed.replicas=3", "etcd.replicas=3", "etcd.persistence.storageClass=fast", "images.pullSecrets={a}", "etcd.nodeSelector.x=y"},
	"etcd-bare": {"etcd.replicas=1", "etcd.persistence.enabled=false", "podDisruptionBudget.enabled=false", "networkPolicy.enabled=false", "etcd.tlsSecret=mine"},
	"addresses": {"federation.advertise={west.example:7443}", "federation.service.type=ClusterIP", "gateway.addresses={gw.example:15443}", "gateway.service.type=ClusterIP", "gateway.hostPort=15443", "region=eu-1", "network=flat", "labels.tier=gold"},
	"ports":     {"federation.service.type=NodePort", "federation.service.nodePort=30743", "gateway.service.type=NodePort", "gateway.service.nodePort=30443", "gateway.replicas=1"},
	"spire":     {"identity.spire.server=spire-server.spire-server:8081"},
	"spire-dir": {"identity.spire.server=spire-server.spire-server:8081", "identity.spire.hostPath=/run/spire/agent-sockets", "webhooks.enabled=false"},
	"node":      {"capture.mode=node", "images.pullSecrets={a}", "capture.nodeSelector.x=y"},
	"extras":    {"images.pullSecrets={a,b}", "metrics.enabled=true", "admins[0].kind=Group", "admins[0].name=mesh-admins", "hansed.config.log.level=debug", "hansed.nodeSelector.x=y", "gateway.priorityClassName=high", "hansed.persistence.storageClass=fast"},
}

// Every object decodes strictly into its Kubernetes type: a field that does not exist is a fault here, not on somebody's cluster.
func TestObjectsAreWhatKubernetesReads(t *testing.T) {
	strict := json.NewSerializerWithOptions(json.DefaultMetaFactory, scheme.Scheme, scheme.Scheme, json.SerializerOptions{Strict: true})
	for name, sets := range variants {
		t.Run(name, func(t *testing.T) {
			for _, o := range render(t, west(sets...)) {
				if o.GetKind() == "CustomResourceDefinition" {
					continue // an API server's; test/kube applies them
				}
				b, err := o.MarshalJSON()
				if err != nil {
					t.Fatal(err)
				}
				into, err := scheme.Scheme.New(o.GroupVersionKind())
				if err != nil {
					t.Fatalf("%s %s: %v", o.GetKind(), o.GetName(), err)
				}
				if _, _, err := strict.Decode(b, nil, into); err != nil {
					t.Errorf("%s %s: %v", o.GetKind(), o.GetName(), err)
				}
				if o.GetLabels()["app.kubernetes.io/part-of"] != "hanse" {
					t.Errorf("%s %s has not the label by which uninstall finds it", o.GetKind(), o.GetName())
				}
			}
		})
	}
}

func podSpec(t *testing.T, all []*unstructured.Unstructured, kind, name string) corev1.PodSpec {
	t.Helper()
	var w struct {
		Spec struct{ Template corev1.PodTemplateSpec }
	}
	b, err := find(t, all, kind, name).MarshalJSON()
	if err == nil {
		err = yaml.Unmarshal(b, &w)
	}
	if err != nil {
		t.Fatal(err)
	}
	return w.Spec.Template.Spec
}

// What Pod Security calls restricted, field by field.
func TestPodsAreRestricted(t *testing.T) {
	all := render(t, west("etcd.replicas=3"))
	for name, kind := range map[string]string{"hansed": "StatefulSet", "hanse-etcd": "StatefulSet", "hanse-gateway": "Deployment"} {
		p := podSpec(t, all, kind, name)
		if s := p.SecurityContext; !*s.RunAsNonRoot || *s.RunAsUser != 65532 || s.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault || p.HostNetwork || p.HostPID || p.HostIPC {
			t.Errorf("%s: %+v", name, s)
		}
		for _, c := range p.Containers {
			s := c.SecurityContext
			if *s.AllowPrivilegeEscalation || !*s.ReadOnlyRootFilesystem || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) || len(s.Capabilities.Add) > 0 {
				t.Errorf("%s/%s: %+v", name, c.Name, s)
			}
			for _, port := range c.Ports {
				if port.HostPort != 0 {
					t.Errorf("%s/%s: host port %d by default", name, c.Name, port.HostPort)
				}
			}
			if c.Resources.Requests.Cpu().IsZero() || c.Resources.Requests.Memory().IsZero() || c.Resources.Limits.Memory().IsZero() || c.ReadinessProbe == nil {
				t.Errorf("%s/%s has no requests, limit or probe", name, c.Name)
			}
		}
		for _, v := range p.Volumes {
			if v.HostPath != nil {
				t.Errorf("%s: volume %s is of the host", name, v.Name)
			}
		}
	}
	if p := podSpec(t, all, "Deployment", "hanse-gateway"); p.AutomountServiceAccountToken == nil || *p.AutomountServiceAccountToken {
		t.Error("a gateway has the token of its account for the API server, which it does not need")
	}
	if find(t, all, "Namespace", Namespace).GetLabels()["pod-security.kubernetes.io/enforce"] != "restricted" {
		t.Error("the namespace does not enforce it")
	}
}

// With capture from the node, what does it there has the three capabilities that it needs, and no word with the API server; the injector knows.
func TestCaptureOnNode(t *testing.T) {
	if slices.ContainsFunc(render(t, west()), func(o *unstructured.Unstructured) bool { return o.GetKind() == "DaemonSet" }) {
		t.Error("there is a DaemonSet by default")
	}
	all := render(t, west("capture.mode=node"))
	p := podSpec(t, all, "DaemonSet", "hanse-node")
	s := p.Containers[0].SecurityContext
	if !p.HostPID || p.HostNetwork || *p.AutomountServiceAccountToken || len(p.Volumes) > 0 || s.Privileged != nil || *s.AllowPrivilegeEscalation || !slices.Equal(s.Capabilities.Add, []corev1.Capability{"SYS_PTRACE", "SYS_ADMIN", "NET_ADMIN"}) {
		t.Errorf("%+v", p)
	}
	config, _, _ := unstructured.NestedString(find(t, all, "ConfigMap", "hansed").Object, "data", "hansed.yaml")
	if !strings.Contains(config, "capture: node") {
		t.Errorf("hansed is not told:\n%s", config)
	}
	if find(t, all, "Namespace", Namespace).GetLabels()["pod-security.kubernetes.io/enforce"] != "privileged" {
		t.Error("the namespace does not let it run")
	}
}

// With a SPIRE, nothing of hansed's own authority is left: no port, no token, no trust bundle, no right; and everybody has the agent's socket, by CSI in Pods that are restricted.
func TestOnSPIRE(t *testing.T) {
	for name, c := range map[string]struct {
		sets  []string
		level string
		of    func(corev1.Volume) bool
	}{
		"spire":     {level: "restricted", of: func(v corev1.Volume) bool { return v.CSI != nil && v.CSI.Driver == "csi.spiffe.io" && *v.CSI.ReadOnly }},
		"spire-dir": {level: "privileged", of: func(v corev1.Volume) bool { return v.HostPath != nil && v.HostPath.Path == "/run/spire/agent-sockets" }},
	} {
		all := render(t, west(variants[name]...))
		if l := find(t, all, "Namespace", Namespace).GetLabels()["pod-security.kubernetes.io/enforce"]; l != c.level {
			t.Errorf("%s: the namespace enforces %s, want %s", name, l, c.level)
		}
		for kind, workload := range map[string]string{"StatefulSet": "hansed", "Deployment": "hanse-gateway"} {
			p := podSpec(t, all, kind, workload)
			if !slices.ContainsFunc(p.Volumes, func(v corev1.Volume) bool { return v.Name == "workload-api" && c.of(v) }) ||
				!slices.ContainsFunc(p.Containers[0].VolumeMounts, func(m corev1.VolumeMount) bool {
					return m.Name == "workload-api" && m.MountPath == "/run/hanse-workload-api" && m.ReadOnly
				}) {
				t.Errorf("%s: %s has not the agent's socket: %+v", name, workload, p.Volumes)
			}
			if slices.ContainsFunc(p.Volumes, func(v corev1.Volume) bool { return v.Name == "token" || v.Name == "root" }) ||
				slices.ContainsFunc(p.Containers[0].Ports, func(p corev1.ContainerPort) bool { return p.ContainerPort == 7444 }) {
				t.Errorf("%s: %s has something of hansed's own authority: %+v", name, workload, p)
			}
		}
		text, err := YAML(all)
		if err != nil {
			t.Fatal(err)
		}
		for _, no := range []string{"7444", "tokenreviews", "podToken", "port: identity", "x509pop"} {
			if bytes.Contains(text, []byte(no)) {
				t.Errorf("%s: there is %q", name, no)
			}
		}
	}
	config := render(t, west("identity.spire.server=spire-server.spire-server:8081", "identity.spire.parent=spiffe://{{.TrustDomain}}/agents"))
	text, _, _ := unstructured.NestedString(find(t, config, "ConfigMap", "hansed").Object, "data", "hansed.yaml")
	for _, want := range []string{"server: spire-server.spire-server:8081", "workloadAPI: unix:///run/hanse-workload-api/spire-agent.sock", "bundleEndpoint: hansed.hanse-system.svc:7446",
		"parent: spiffe://{{.TrustDomain}}/agents", "k8s:ns:{{.Namespace}}", "k8s:sa:{{.ServiceAccount}}", "k8s:sa:hanse-gateway", "csiDriver: csi.spiffe.io"} {
		if !strings.Contains(text, want) {
			t.Errorf("hansed.yaml has no %q:\n%s", want, text)
		}
	}
}

// docs/kubernetes.md has one row for each rule of the roles, with its reason; neither has what the other has not.
func TestEveryRuleHasItsReason(t *testing.T) {
	doc, err := os.ReadFile(top + "docs/kubernetes.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| `(ClusterRole|Role)` (\\S+) \\| (.*?) \\| (.*?) \\| (.+?) \\|$").FindAllStringSubmatch(string(doc), -1) {
		if len(m[5]) < 8 {
			t.Errorf("%s %s %s: %q is no reason", m[1], m[2], m[3], m[5])
		}
		documented[strings.Join(m[1:5], " | ")] = true
	}
	for _, o := range render(t, west("webhooks.enabled=true")) {
		if o.GetKind() != "ClusterRole" && o.GetKind() != "Role" {
			continue
		}
		var role rbacv1.ClusterRole
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &role); err != nil {
			t.Fatal(err)
		}
		for _, r := range role.Rules {
			if slices.Contains(r.Verbs, "*") || slices.Contains(r.Resources, "*") || slices.Contains(r.APIGroups, "*") {
				t.Errorf("%s %s: a wildcard: %+v", o.GetKind(), o.GetName(), r)
			}
			group := strings.Join(r.APIGroups, ", ")
			what := strings.Join(r.Resources, ", ")
			if group != "" {
				what += " (" + group + ")"
			}
			if len(r.ResourceNames) > 0 {
				what += " named " + strings.Join(r.ResourceNames, ", ")
			}
			key := strings.Join([]string{o.GetKind(), o.GetName(), what, strings.Join(r.Verbs, ", ")}, " | ")
			if !documented[key] {
				t.Errorf("docs/kubernetes.md has no row\n| `%s` %s | %s | %s | why |", o.GetKind(), o.GetName(), what, strings.Join(r.Verbs, ", "))
			}
			delete(documented, key)
		}
	}
	for k := range documented {
		t.Errorf("docs/kubernetes.md has a row that no role has: %s", k)
	}
}

func TestCopiesAreEqual(t *testing.T) {
	own, err := filepath.Glob(top + "deploy/crd/*.yaml")
	if err != nil || len(own) == 0 {
		t.Fatal(own, err)
	}
	copies, err := filepath.Glob(top + "deploy/chart/hanse/crds/*.yaml")
	if err != nil || len(copies) != len(own) {
		t.Errorf("the chart has %d CustomResourceDefinitions of deploy/crd's %d: run make crds", len(copies), len(own))
	}
	for _, f := range own {
		a, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(top + "deploy/chart/hanse/crds/" + filepath.Base(f)); err != nil || !bytes.Equal(a, b) {
			t.Errorf("%s: the chart has another one (%v): run make crds", f, err)
		}
	}
	const trust = "spire.spiffe.io_clusterfederatedtrustdomains.yaml"
	a, err := os.ReadFile(top + "deploy/crd/optional/" + trust)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(top + "deploy/chart/hanse/files/spire/" + trust); err != nil || !bytes.Equal(a, b) {
		t.Errorf("%s: the chart has another one (%v): run make manifests", trust, err)
	}
	mcs := map[string]string{"serviceexports": string(crd.ServiceExportCRD), "serviceimports": string(crd.ServiceImportCRD)}
	for name, want := range mcs {
		if b, err := os.ReadFile(top + "deploy/chart/hanse/files/mcs/multicluster.x-k8s.io_" + name + ".yaml"); err != nil || string(b) != want {
			t.Errorf("%s: not the one of the module sigs.k8s.io/mcs-api: %v", name, err)
		}
	}
	makefile, err := os.ReadFile(top + "Makefile")
	if err != nil {
		t.Fatal(err)
	}
	c, err := load()
	if err != nil {
		t.Fatal(err)
	}
	if m := regexp.MustCompile(`(?m)^VERSION\s*\?= (\S+)$`).FindSubmatch(makefile); m == nil || string(m[1]) != c.Metadata.AppVersion || "v"+c.Metadata.Version != c.Metadata.AppVersion {
		t.Errorf("Chart.yaml has version %s and appVersion %s, the Makefile %s", c.Metadata.Version, c.Metadata.AppVersion, m)
	}
}

// Bad values are refused before anything is asked of a cluster, by field, value and remedy.
func TestBadValues(t *testing.T) {
	for name, c := range map[string]struct {
		sets []string
		want []string
	}{
		"nothing":            {[]string{"cluster="}, []string{"cluster"}},
		"a cluster's name":   {[]string{"cluster=West_1"}, []string{"cluster", "West_1"}},
		"an unknown value":   {[]string{"gatway.enabled=false"}, []string{"gatway"}},
		"two replicas":       {[]string{"hansed.replicas=2"}, []string{"hansed.replicas", "etcd.endpoints"}},
		"a type of Service":  {[]string{"gateway.service.type=Loadbalancer"}, []string{"gateway/service/type"}},
		"an address":         {[]string{"federation.advertise={west.example}"}, []string{"federation/advertise/0"}},
		"a curve":            {[]string{"identity.keys.curve=P-521"}, []string{"identity/keys/curve", "P-384"}},
		"a proxy's curve":    {[]string{"identity.proxyKeys.curve=p-384"}, []string{"identity/proxyKeys/curve"}},
		"storage":            {[]string{"identity.keys.storage=tpm"}, []string{"identity/keys/storage", "memory"}},
		"memory alone":       {[]string{"identity.keys.storage=memory"}, []string{"identity.keys.storage", "hansed.config.identity.upstream"}},
		"SPIRE's address":    {[]string{"identity.spire.server=unix:///run/spire/server.sock"}, []string{"identity/spire/server"}},
		"SPIRE's socket":     {[]string{"identity.spire.socket=a/b.sock"}, []string{"identity/spire/socket"}},
		"no way to SPIRE":    {[]string{"identity.spire.server=spire:8081", "identity.spire.csiDriver="}, []string{"identity.spire", "csi.spiffe.io", "hostPath"}},
		"a policy":           {[]string{"webhooks.injectFailurePolicy=fail"}, []string{"injectFailurePolicy"}},
		"two faults at once": {[]string{"cluster=A", "gateway.replicas=-1"}, []string{"cluster", "gateway/replicas"}},
	} {
		_, err := Objects(west(c.sets...))
		for _, w := range c.want {
			if err == nil || !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %v, want %q in it", name, err, w)
			}
		}
	}
	if _, err := Objects(Options{Values: west().Values, KubeVersion: "v1.27.3"}); err == nil || !strings.Contains(err.Error(), "1.32") {
		t.Errorf("an old Kubernetes: %v", err)
	}
	if _, err := Merge([][]byte{[]byte("a: 1\na: 2\n")}, nil); err == nil {
		t.Error("a key twice in a file is taken")
	}
}

// The comments of values.yaml are its documentation: every value has a line, and the schema knows exactly these.
func TestValuesAreDescribed(t *testing.T) {
	var v map[string]any
	if err := yaml.Unmarshal([]byte(Defaults()), &v); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(top + "deploy/chart/hanse/values.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	var schema map[string]any
	if err := yaml.Unmarshal(b, &schema); err != nil {
		t.Fatal(err)
	}
	var walk func(path string, v map[string]any, schema map[string]any)
	walk = func(path string, v map[string]any, schema map[string]any) {
		props, _ := schema["properties"].(map[string]any)
		if props == nil {
			return
		}
		for k, x := range v {
			p, ok := props[k].(map[string]any)
			if !ok {
				t.Errorf("values.schema.json has no %s%s", path, k)
			} else if m, ok := x.(map[string]any); ok {
				walk(path+k+".", m, p)
			}
		}
		for k := range props {
			if _, ok := v[k]; !ok && k != "global" {
				t.Errorf("values.yaml has no %s%s", path, k)
			}
		}
	}
	walk("", v, schema)
}

// TestFaultsHaveAnOrder: the same values get the same words each time.
func TestFaultsHaveAnOrder(t *testing.T) {
	const want = "at 'cluster': one; at 'trustDomain': two"
	for _, text := range []string{
		"values don't meet the specifications of the schema(s) in the following chart(s):\nhanse:\n- at '/trustDomain': two\n- at '/cluster': one\n",
		"values don't meet the specifications of the schema(s) in the following chart(s):\nhanse:\n- at '/cluster': one\n- at '/trustDomain': two\n",
	} {
		if got := tidy(text); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	if got := tidy("b\na"); got != "b; a" {
		t.Errorf("another error's lines: %q", got)
	}
}
