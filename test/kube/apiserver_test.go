package kube

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
)

const tools = "../../bin/tools/"

func TestMain(m *testing.M) {
	if os.Getenv(scaleEnv) != "" {
		readOnly()
		return
	}
	if _, err := os.Stat(tools + "kube-apiserver"); err != nil {
		fmt.Println("test/kube: SKIPPED: there is no kube-apiserver in bin/tools; `make test-kube` builds it")
		return
	}
	os.Exit(m.Run())
}

// need skips a test that needs a program of bin/tools which is not there, or fails it where HANSE_NO_SKIP is set, as it is in CI.
func need(t testing.TB, program, why string) {
	t.Helper()
	if _, err := os.Stat(tools + program); err == nil {
		return
	}
	if os.Getenv("HANSE_NO_SKIP") != "" {
		t.Fatalf("there is no %s in bin/tools (make test-kube builds it), so %s", program, why)
	}
	t.Skipf("SKIPPED, NOT TESTED: there is no %s in bin/tools (make test-kube builds it), so %s", program, why)
}

// server is a kube-apiserver with an etcd of its own.
type server struct {
	t     testing.TB
	dir   string
	addr  string
	flags []string // in addition
	etcd  *embed.Etcd
	cmd   *exec.Cmd
	done  chan struct{} // closed when cmd has ended

	mu        sync.Mutex
	resources map[schema.GroupVersionKind]*meta.RESTMapping // guarded by mu

	config *rest.Config
	client dynamic.Interface
}

// hosts counts the addresses that freePorts has handed out.
var hosts atomic.Uint32

// freePorts returns n addresses that nobody listens on. Where all of 127.0.0.0/8 is loopback, each call has an address to itself there: tests run beside each other, and a port that is free
// on a shared one may be taken, also by somebody's outgoing connection, before it is used.
func freePorts(t testing.TB, n int) []string {
	t.Helper()
	h := hosts.Add(1)
	host := netip.AddrFrom4([4]byte{127, 128 | byte(os.Getpid()), byte(h >> 8), byte(h)}).String()
	if l, err := net.Listen("tcp", host+":0"); err != nil {
		host = "127.0.0.1"
	} else {
		_ = l.Close()
	}
	return freePortsAt(t, host, n)
}

func freePortsAt(t testing.TB, host string, n int) []string {
	t.Helper()
	var out []string
	for range n {
		l, err := net.Listen("tcp", host+":0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close() // together, so that no port is given twice
		out = append(out, l.Addr().String())
	}
	return out
}

// start runs an API server until the test ends; flags are in addition to the usual ones, and win.
func start(t testing.TB, flags ...string) *server {
	t.Helper()
	ports := freePorts(t, 3)
	s := &server{t: t, dir: t.TempDir(), addr: ports[0], flags: flags, resources: map[schema.GroupVersionKind]*meta.RESTMapping{}}
	cfg := embed.NewConfig()
	cfg.Dir, cfg.LogLevel = filepath.Join(s.dir, "etcd"), "panic"
	client, peer := &url.URL{Scheme: "http", Host: ports[1]}, &url.URL{Scheme: "http", Host: ports[2]}
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{*client}, []url.URL{*client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{*peer}, []url.URL{*peer}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.UnsafeNoFsync = true
	var err error
	if s.etcd, err = embed.StartEtcd(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.etcd.Close)
	s.writeKeys()
	s.run()
	t.Cleanup(s.kill)
	s.config = &rest.Config{Host: "https://" + s.addr, BearerToken: "admintoken", TLSClientConfig: rest.TLSClientConfig{CAFile: filepath.Join(s.dir, "pki/apiserver.crt")}, QPS: 2000, Burst: 4000}
	if s.client, err = dynamic.NewForConfig(s.config); err != nil {
		t.Fatal(err)
	}
	return s
}

// writeKeys makes what signs service account tokens, and the administrator's token.
func (s *server) writeKeys() {
	s.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		s.t.Fatal(err)
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		s.t.Fatal(err)
	}
	s.write("sa.key", pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}))
	s.write("tokens.csv", []byte("admintoken,admin,1,\"system:masters\"\n"))
}

func (s *server) write(name string, data []byte) {
	if err := os.WriteFile(filepath.Join(s.dir, name), data, 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// run starts the program and waits until it is ready.
func (s *server) run() {
	s.t.Helper()
	host, port, _ := net.SplitHostPort(s.addr)
	log, err := os.OpenFile(filepath.Join(s.dir, "apiserver.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		s.t.Fatal(err)
	}
	defer log.Close()
	s.cmd = exec.Command(tools+"kube-apiserver", "--etcd-servers="+s.etcd.Config().AdvertiseClientUrls[0].String(), "--bind-address="+host, "--advertise-address="+host, "--secure-port="+port,
		"--endpoint-reconciler-type=none", "--cert-dir="+filepath.Join(s.dir, "pki"), "--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file="+filepath.Join(s.dir, "sa.key"), "--service-account-signing-key-file="+filepath.Join(s.dir, "sa.key"),
		"--service-cluster-ip-range=10.96.0.0/16", "--token-auth-file="+filepath.Join(s.dir, "tokens.csv"), "--authorization-mode=RBAC", "--disable-admission-plugins=ServiceAccount")
	s.cmd.Args = append(s.cmd.Args, s.flags...)
	s.cmd.Stdout, s.cmd.Stderr = log, log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.done = make(chan struct{})
	go func() {
		_ = s.cmd.Wait()
		close(s.done)
	}()
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: insecure(), DisableKeepAlives: true}, Timeout: 5 * time.Second}
	deadline := time.Now().Add(2 * time.Minute)
	for {
		req, _ := http.NewRequest("GET", "https://"+s.addr+"/readyz", nil)
		req.Header.Set("Authorization", "Bearer admintoken")
		if resp, err := client.Do(req); err == nil {
			resp.Body.Close()
			if resp.StatusCode == 200 {
				return
			}
		}
		select {
		case <-s.done:
			s.t.Fatalf("kube-apiserver ended:\n%s", s.tail())
		case <-time.After(100 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("kube-apiserver is not ready after 2 min:\n%s", s.tail())
		}
	}
}

func (s *server) tail() []byte {
	b, _ := os.ReadFile(filepath.Join(s.dir, "apiserver.log"))
	return b[max(0, len(b)-4000):]
}

// kill ends the program at once; etcd goes on.
func (s *server) kill() {
	_ = s.cmd.Process.Kill()
	<-s.done
}

// apply creates or changes the objects of a YAML stream, by server-side apply.
func (s *server) apply(yaml []byte) {
	s.t.Helper()
	for _, o := range decode(s.t, yaml) {
		if err := s.tryApply(o); err != nil {
			s.t.Fatalf("apply %s %s/%s: %v", o.GetKind(), o.GetNamespace(), o.GetName(), err)
		}
	}
}

func decode(t testing.TB, yaml []byte) []*unstructured.Unstructured {
	t.Helper()
	var out []*unstructured.Unstructured
	d := utilyaml.NewYAMLOrJSONDecoder(bytes.NewReader(yaml), 4096)
	for {
		o := &unstructured.Unstructured{}
		if err := d.Decode(o); err != nil {
			if err.Error() == "EOF" {
				return out
			}
			t.Fatal(err)
		}
		if len(o.Object) > 0 {
			out = append(out, o)
		}
	}
}

func (s *server) tryApply(o *unstructured.Unstructured) error {
	r, err := s.resource(o)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_, err = r.Apply(ctx, o.GetName(), o, metav1.ApplyOptions{FieldManager: "test", Force: true})
	return err
}

// resource finds how the server names o's kind; a kind that has just been defined may take a moment.
func (s *server) resource(o *unstructured.Unstructured) (dynamic.ResourceInterface, error) {
	dc, err := discovery.NewDiscoveryClientForConfig(s.config)
	if err != nil {
		return nil, err
	}
	gvk := o.GroupVersionKind()
	s.mu.Lock()
	defer s.mu.Unlock()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		m := s.resources[gvk]
		if m == nil {
			groups, err := restmapper.GetAPIGroupResources(dc)
			if err == nil {
				m, err = restmapper.NewDiscoveryRESTMapper(groups).RESTMapping(gvk.GroupKind(), gvk.Version)
			}
			if err != nil {
				if time.Now().After(deadline) {
					return nil, err
				}
				continue
			}
			s.resources[gvk] = m
		}
		if m.Scope.Name() == meta.RESTScopeNameRoot {
			return s.client.Resource(m.Resource), nil
		}
		ns := o.GetNamespace()
		if ns == "" {
			ns = "default"
		}
		return s.client.Resource(m.Resource).Namespace(ns), nil
	}
}

// namespaces creates those that objects need.
func (s *server) namespaces(names ...string) {
	s.t.Helper()
	for _, n := range names {
		s.apply(fmt.Appendf(nil, "apiVersion: v1\nkind: Namespace\nmetadata: {name: %s}\n", n))
	}
}

func (s *server) delete(gvr schema.GroupVersionResource, namespace, name string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var err error
	if namespace == "" {
		err = s.client.Resource(gvr).Delete(ctx, name, metav1.DeleteOptions{})
	} else {
		err = s.client.Resource(gvr).Namespace(namespace).Delete(ctx, name, metav1.DeleteOptions{})
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *server) patch(gvr schema.GroupVersionResource, namespace, name, merge string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var r dynamic.ResourceInterface = s.client.Resource(gvr)
	if namespace != "" {
		r = s.client.Resource(gvr).Namespace(namespace)
	}
	_, err := r.Patch(ctx, name, types.MergePatchType, []byte(merge), metav1.PatchOptions{})
	return err
}

// crds installs the CustomResourceDefinitions whose file names hold one of the words.
func (s *server) crds(dir string, words ...string) {
	s.t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.yaml"))
	if err != nil || len(files) == 0 {
		s.t.Fatalf("no CustomResourceDefinition in %s: %v", dir, err)
	}
	for _, f := range files {
		for _, w := range words {
			if strings.Contains(filepath.Base(f), w) {
				b, err := os.ReadFile(f)
				if err != nil {
					s.t.Fatal(err)
				}
				s.apply(b)
			}
		}
	}
}

// module is where a module of go.mod has its files.
func module(t testing.TB, path string) string {
	t.Helper()
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", path).Output()
	if err != nil {
		t.Fatalf("go list -m %s: %v", path, err)
	}
	return strings.TrimSpace(string(out))
}
