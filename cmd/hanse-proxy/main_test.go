package main

import (
	"bytes"
	"crypto/elliptic"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestLinksNoControlPlane: neither etcd nor client-go is in the proxy.
func TestLinksNoControlPlane(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for path := range strings.Lines(string(out)) {
		path = strings.TrimSpace(path)
		for _, banned := range []string{"go.etcd.io/", "k8s.io/", "sigs.k8s.io/gateway-api", "sigs.k8s.io/mcs-api", "github.com/hanse-mesh/hanse/federation", "github.com/hanse-mesh/hanse/discovery/objects"} {
			if strings.HasPrefix(path, banned) {
				t.Errorf("hanse-proxy links %s", path)
			}
		}
	}
}

const sample = `
cluster: west
trustDomain: west.demo
region: eu-1
zone: a
namespace: shop
controlPlane:
  identity: ["127.0.1.1:7444"]
  xds: ["127.0.1.1:7445"]
  trustBundle: bundle.json
  tokenFile: payments.token
stateDir: state
listeners:
- {listen: "127.0.0.1:9001", to: "payments.shop:8080"}
workloads:
- address: 127.0.1.11
  ports: {8080: "unix:app.sock", 9000: "127.0.0.1:9101"}
inbound: {gatewaysOnly: [127.0.1.1]}
`

func write(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "proxy.yaml")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestKeys(t *testing.T) {
	with := func(lines string) (*Config, error) { return LoadConfig(write(t, sample+"\n"+lines+"\n"), "", "") }
	for lines, want := range map[string]elliptic.Curve{"": elliptic.P256(), "keys: {curve: P-256}": elliptic.P256(), "keys: {curve: P-384}": elliptic.P384()} {
		if c, err := with(lines); err != nil || c.Keys.elliptic() != want {
			t.Errorf("%s: %v, %v", lines, c, err)
		}
	}
	for lines, want := range map[string]string{
		"keys: {curve: P-521}":   `keys.curve: "P-521" is not one of P-256, P-384`,
		"keys: {curve: p-384}":   "is not one of",
		"keys: {curve: RSA}":     "is not one of",
		"keys: {storage: disk}":  "unknown field",
		"keys: P-384":            "keys",
		"identity: {keys: disk}": "unknown field",
	} {
		if _, err := with(lines); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", lines, err, want)
		}
	}
}

func TestSocketUsers(t *testing.T) {
	with := func(lines string) (*Config, error) { return LoadConfig(write(t, sample+"\n"+lines+"\n"), "", "") }
	c, err := with("socket: /run/hanse/workload.sock\nsocketUsers: [1000, 1001]")
	if err != nil || c.SocketUsers.Any || !slices.Equal(c.SocketUsers.IDs, []uint32{1000, 1001}) {
		t.Errorf("%v %v", c, err)
	}
	if c, err = with("socket: /run/hanse/workload.sock\nsocketUsers: any"); err != nil || !c.SocketUsers.Any {
		t.Errorf("%v %v", c, err)
	}
	if c, err = with("socket: /run/hanse/workload.sock\nsocketGroups: [2000]\nsocketUsers: [1000]"); err != nil || !slices.Equal(c.SocketGroups, []uint32{2000}) || !slices.Equal(c.SocketUsers.IDs, []uint32{1000}) {
		t.Errorf("%v %v", c, err)
	}
	for lines, want := range map[string]string{
		"socket: /run/hanse/workload.sock\nsocketGroups: any":     "list of group IDs",
		"socket: /run/hanse/workload.sock\nsocketGroups: [-1]":    "list of group IDs",
		"socket: /run/hanse/workload.sock\nsocketGroups: [65534]": "a group of their own",
		"socket: none\nsocketGroups: [7]":                         "there is no socket",
		"socketGroups: [7]":                                       "socket is",
	} {
		if _, err := with(lines); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "socketGroups") {
			t.Errorf("%s: %v, want %s", lines, err, want)
		}
	}
	for lines, want := range map[string]string{
		"outbound: {socketUsers: [1000]}": "unknown field",
		"socketUsers: [1000]":             "outside of it",
		"socket: /run/hanse/workload.sock\nsocketUsers: any\nsocketGroups: [7]": "remove one of the two",
		"socket: none\nsocketUsers: any":                                        "there is no socket",
		"socket: /run/hanse/workload.sock\nsocketUsers: alice":                  "list of user IDs",
		"socket: /run/hanse/workload.sock\nsocketUsers: [-1]":                   "list of user IDs",
	} {
		if _, err := with(lines); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "socketUsers") {
			t.Errorf("%s: %v", lines, err)
		}
	}
}

func TestLoadConfig(t *testing.T) {
	path := write(t, sample)
	dir := filepath.Dir(path)
	c, err := LoadConfig(path, "", "")
	if err != nil {
		t.Fatal(err)
	}
	apps, err := c.apps()
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(map[uint16]string{8080: "unix:" + filepath.Join(dir, "app.sock"), 9000: "127.0.0.1:9101"}, apps); d != "" {
		t.Error(d)
	}
	got := []string{c.Role, c.Network, c.Outbound.Listen, c.Admin.Listen, c.Workloads[0].Listen, c.StateDir, c.Socket, c.ControlPlane.TokenFile}
	want := []string{"sidecar", "west", "127.0.0.1:15001", "127.0.0.1:15020", "127.0.1.11:15008", filepath.Join(dir, "state"), filepath.Join(dir, "state/workload.sock"), filepath.Join(dir, "payments.token")}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// TestSample: the file in deploy has every field, and is good.
func TestSample(t *testing.T) {
	b, err := os.ReadFile("../../deploy/systemd/hanse-proxy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	c, err := LoadConfig(write(t, string(b)), "", "")
	if err != nil {
		t.Fatal(err)
	}
	for _, field := range jsonFields(reflect.TypeOf(*c)) {
		if !strings.Contains(string(b), field+":") {
			t.Errorf("the sample does not name %s", field)
		}
	}
}

func jsonFields(typ reflect.Type) []string {
	var names []string
	for i := range typ.NumField() {
		f := typ.Field(i)
		if name := f.Tag.Get("json"); name != "" {
			names = append(names, name)
		}
		ft := f.Type
		if ft.Kind() == reflect.Slice {
			ft = ft.Elem()
		}
		if ft.Kind() == reflect.Struct && ft != reflect.TypeFor[Duration]() {
			names = append(names, jsonFields(ft)...)
		}
	}
	return names
}

// TestFaults: all are reported together, each with its field.
func TestFaults(t *testing.T) {
	path := write(t, `
cluster: West
trustDomain: "no domain"
controlPlane: {xds: ["nowhere"]}
outbound: {listen: "0.0.0.0:15001"}
listeners: [{listen: "10.0.0.1:1"}]
workloads: [{address: payments, ports: {x: y}}, {address: 10.0.0.1}]
inbound: {gatewaysOnly: [gateway]}
admin: {listen: ":15020"}
otlp: {sample: 7}
log: {level: loud}
`)
	_, err := LoadConfig(path, "", "")
	if err == nil {
		t.Fatal("no error")
	}
	for _, field := range []string{"cluster:", "trustDomain:", "namespace:", "stateDir:", "controlPlane.identity:", "controlPlane.xds[0]:", "outbound.listen:", "listeners[0].listen:", "listeners[0].to:",
		"workloads:", "workloads[0].address:", "inbound.gatewaysOnly[0]:", "admin.listen:", "otlp.sample:", "log.level:"} {
		if !strings.Contains(err.Error(), "  "+field) {
			t.Errorf("no word on %s in\n%v", field, err)
		}
	}
}

func TestUnknownField(t *testing.T) {
	if _, err := LoadConfig(write(t, sample+"tokenfile: x\n"), "", ""); err == nil || !strings.Contains(err.Error(), "tokenfile") {
		t.Errorf("error %v", err)
	}
}

func TestExternalAgent(t *testing.T) {
	external := strings.Replace(sample, `  identity: ["127.0.1.1:7444"]`+"\n", "", 1)
	c, err := LoadConfig(write(t, external), "", "unix:///run/spire/agent.sock")
	if err != nil || c.ControlPlane.WorkloadAPI != "unix:///run/spire/agent.sock" || c.Socket != none {
		t.Errorf("%+v, %v", c, err)
	}
	if c, err := LoadConfig(write(t, sample), "", "unix:///run/spire/agent.sock"); err != nil || c.ControlPlane.WorkloadAPI != "" {
		t.Errorf("the file does not win over the environment: %+v, %v", c, err)
	}
}

func TestCheck(t *testing.T) {
	for _, tc := range []struct {
		args []string
		code int
		out  string
	}{
		{[]string{"--check", "--config", write(t, sample)}, 0, "ok, role sidecar"},
		{[]string{"--check", "--config", write(t, strings.Split(sample, "namespace")[0]+"controlPlane: {identity: ['a:1'], xds: ['a:2']}\nstateDir: s\n"), "--role", "gateway"}, 0, "ok, role gateway"},
		{[]string{"--check", "--role", "gateway", "--config", write(t, sample)}, 1, "gateway has no outbound"},
		{[]string{"--check", "--config", "/nowhere"}, 1, "hint:"},
		{[]string{"--check", "surplus"}, 2, "hint:"},
		{[]string{"--nonsense"}, 2, "nonsense"},
		{[]string{"--version"}, 0, "hanse-proxy v"},
	} {
		var out bytes.Buffer
		if code := run(tc.args, &out, &out); code != tc.code || !strings.Contains(out.String(), tc.out) {
			t.Errorf("%v: exit %d\n%s", tc.args, code, out.String())
		}
	}
}

func TestBootstrap(t *testing.T) {
	path := write(t, `
role: agent
cluster: west
trustDomain: west.demo
zone: a
controlPlane: {identity: ["127.0.1.1:7444"], xds: ["127.0.1.1:7445", "127.0.1.2:7445"]}
stateDir: state
nodeID: n1
`)
	c, err := LoadConfig(path, "", "")
	if err != nil {
		t.Fatal(err)
	}
	if err := writeBootstrap(c); err != nil {
		t.Fatal(err)
	}
	files := filepath.Join(filepath.Dir(path), "state", "files")
	b, err := os.ReadFile(filepath.Join(files, "bootstrap.json"))
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Servers []struct {
			URI string `json:"server_uri"`
		} `json:"xds_servers"`
		Node struct {
			ID string `json:"id"`
		} `json:"node"`
		Providers map[string]struct {
			Plugin string            `json:"plugin_name"`
			Config map[string]string `json:"config"`
		} `json:"certificate_providers"`
	}
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	if len(got.Servers) != 2 || got.Servers[1].URI != "127.0.1.2:7445" || got.Node.ID != "n1" || got.Providers["spiffe"].Config["certificate_file"] != filepath.Join(files, "svid.pem") {
		t.Errorf("%s", b)
	}
	env, err := os.ReadFile(filepath.Join(files, "grpc.env"))
	if err != nil || !strings.Contains(string(env), "GRPC_XDS_BOOTSTRAP="+files) {
		t.Errorf("%s, %v", env, err)
	}
	for _, name := range []string{"bootstrap.json", "grpc.env"} {
		if fi, err := os.Stat(filepath.Join(files, name)); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, fi.Mode(), err)
		}
	}
}
