//go:build linux

package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/test/kube/lab"
)

// TestReplicas: several hansed in Pods; west's over an etcd that is there already, east's over one that the chart brings. Those that lead are killed, and a member of etcd; Pods are
// evicted, and upgraded: no call fails, changes go on, and nobody loses its authority or its place in the mesh.
func TestReplicas(t *testing.T) {
	s := up(t, lab.Config{Hosts: []string{"etcd"}})
	west, east := s.west, s.east
	s.step("install several, and join", func() {
		for i, n := range []int{3, 5} { // beside the one that every cluster has
			for v := 1; v < n; v++ {
				s.both()[i].volume(fmt.Sprintf("volume-%d", v))
			}
		}
		etcd := s.etcd(s.hosts["etcd"])
		west.kubectl("create", "namespace", system)
		west.apply(etcd.secret())
		s.install(west, "hansed.replicas=3", "gateway.replicas=1", "etcd.endpoints={"+etcd.url+"}", "etcd.tlsSecret=etcd")
		s.install(east, "hansed.replicas=2", "gateway.replicas=1", "etcd.replicas=3", "etcd.image=hanse.mesh/etcd:"+version, "etcd.command={/etcd}")
		for _, c := range s.both() {
			s.t.Logf("%s", s.hanse("check", "--context", c.Name))
		}
		s.hanse("join", "--context", "east", "--to-context", "west")
		s.openShop()
		s.until(time.Minute, func() error { return s.joined(west, east) })
		s.until(time.Minute, func() error { return s.joined(east, west) })
		for c, n := range map[*cluster]int{west: 3, east: 2} {
			s.until(time.Minute, func() error { // each signs by its own root
				all, err := s.replicas(c.Name)
				if err == nil && (len(all) != n || slices.ContainsFunc(all, func(r replica) bool { return !r.Signs })) {
					err = fmt.Errorf("%s: %+v", c.Name, all)
				}
				return err
			})
		}
		west.kubectl("-n", "shop", "scale", "deployment/payments", "--replicas=1")
		for _, c := range s.both() {
			c.kubectl("-n", "shop", "scale", "deployment/load", "--replicas=1")
			c.kubectl("-n", "shop", "rollout", "status", "deployment/load", "--timeout=60s")
		}
	})
	roots := map[*cluster]string{west: s.roots("west"), east: s.roots("east")}
	s.step("the one that leads is killed", func() {
		loads := []*load{west.load(), east.load()}
		was := s.leader("west")
		began := time.Now()
		west.kubectl("-n", system, "delete", "pod", was, "--grace-period=0", "--force")
		// Changes of either cluster go on: a ServiceExport of the other, an endpoint of this one.
		east.export("catalog")
		s.until(30*time.Second, func() error { return west.answered("frontend", catalogURL, "east") })
		s.t.Logf("an export of the other cluster is in force after %.1f s", time.Since(began).Seconds())
		west.kubectl("-n", "shop", "scale", "deployment/catalog", "--replicas=1")
		west.kubectl("-n", "shop", "rollout", "status", "deployment/catalog", "--timeout=60s")
		west.export("catalog")
		s.until(30*time.Second, func() error { return west.answered("frontend", catalogURL, "west") })
		s.until(time.Minute, func() error {
			if now := s.leader("west"); now == "" {
				return errors.New("nobody leads")
			}
			return west.allReady("hansed", 3)
		})
		s.t.Logf("%s led, now %s", was, s.leader("west"))
		for _, l := range loads {
			l.mustHaveServed(100)
		}
	})
	s.step("evicted one after the other", func() {
		loads := []*load{west.load(), east.load()}
		for i := range 3 {
			pod, other := fmt.Sprintf("hansed-%d", i), fmt.Sprintf("hansed-%d", (i+1)%3)
			s.until(30*time.Second, func() error { return west.evict(pod) }) // the budget's controller follows with a delay
			if err := west.evict(other); err == nil || !strings.Contains(err.Error(), "disruption budget") {
				s.t.Errorf("%s was evicted a moment ago, and so may be %s: %v", pod, other, err)
			}
			s.until(time.Minute, func() error { return west.allReady("hansed", 3) })
		}
		for _, l := range loads {
			l.mustHaveServed(100)
		}
	})
	s.step("a leader and a member of the chart's etcd are killed", func() {
		loads := []*load{west.load(), east.load()}
		was := s.leader("east")
		east.kubectl("-n", system, "delete", "pod", was, "hanse-etcd-1", "--grace-period=0", "--force")
		east.kubectl("-n", "shop", "delete", "serviceexport", "catalog")
		s.until(30*time.Second, func() error { // told by whoever leads next
			out, err := west.Kubectl(s.ctx, "-n", "shop", "get", "serviceimport", "catalog", "-o", "jsonpath={.status.clusters[*].cluster}")
			if err == nil && out != "west" {
				err = fmt.Errorf("catalog is imported from %s", out)
			}
			return err
		})
		s.until(time.Minute, func() error { return east.allReady("hanse-etcd", 3) })
		s.until(time.Minute, func() error { return east.allReady("hansed", 2) })
		s.t.Logf("%s led, now %s", was, s.leader("east"))
		s.until(30*time.Second, func() error { return east.evict("hanse-etcd-0") })
		if err := east.evict("hanse-etcd-2"); err == nil || !strings.Contains(err.Error(), "disruption budget") {
			s.t.Errorf("two members of etcd may be evicted: %v", err)
		}
		s.until(time.Minute, func() error { return east.allReady("hanse-etcd", 3) })
		for _, l := range loads {
			l.mustHaveServed(100)
		}
	})
	s.step("a rolling upgrade of three", func() {
		loads := []*load{west.load(), east.load()}
		s.hanse("upgrade", "--context", "west", "--yes", "--set", "hansed.logLevel=debug")
		for _, l := range loads {
			l.mustHaveServed(100)
		}
	})
	s.step("the same authorities, and nobody joined anew", func() {
		s.t.Logf("memory: %s", east.memory(system))
		for _, c := range s.both() {
			if now := s.roots(c.Name); now != roots[c] {
				s.t.Errorf("%s: roots were\n%s\nand are\n%s", c.Name, roots[c], now)
			}
		}
		s.until(time.Minute, func() error { return s.joined(west, east) })
		s.until(time.Minute, func() error { return s.joined(east, west) })
	})
}

const catalogURL = "http://catalog.shop.svc.clusterset.local:8080/"

// replica is what hanse status says of one.
type replica struct {
	Name         string
	Leads, Signs bool
}

func (s *scene) replicas(context string) ([]replica, error) {
	out, err := s.tryHanse("--context", context, "status", "-o", "json")
	var r struct{ Replicas []replica }
	if err == nil {
		err = json.Unmarshal([]byte(out), &r)
	}
	return r.Replicas, err
}

// leader is the Pod that leads, "" if nobody knows.
func (s *scene) leader(context string) string {
	all, _ := s.replicas(context)
	for _, r := range all {
		if r.Leads {
			return r.Name
		}
	}
	return ""
}

// roots are the authorities that a cluster's own bundle has.
func (s *scene) roots(context string) string {
	s.t.Helper()
	out := s.hanse("--context", context, "trust", "export")
	var b struct{ Keys []struct{ X5c []string } }
	if err := json.Unmarshal([]byte(out), &b); err != nil {
		s.t.Fatalf("%v: %s", err, out)
	}
	var all []string
	for _, k := range b.Keys {
		all = append(all, k.X5c...)
	}
	slices.Sort(all)
	return strings.Join(all, "\n")
}

// allReady: all Pods of a StatefulSet are.
func (c *cluster) allReady(set string, n int) error {
	out, err := c.Kubectl(c.s.ctx, "-n", system, "get", "statefulset", set, "-o", "jsonpath={.status.readyReplicas} of {.status.replicas}")
	if want := fmt.Sprintf("%d of %d", n, n); err == nil && out != want {
		err = fmt.Errorf("%s: %s ready", set, out)
	}
	return err
}

// memory is what a kubelet says that Pods use, and their CPU.
func (c *cluster) memory(namespace string) string {
	c.s.t.Helper()
	var all struct {
		Pods []struct {
			PodRef struct{ Name, Namespace string }
			Memory struct{ WorkingSetBytes, RSSBytes float64 }
			CPU    struct{ UsageCoreNanoSeconds, UsageNanoCores float64 }
		}
	}
	out := c.kubectl("get", "--raw", "/api/v1/nodes/"+c.Nodes[0].Name+"/proxy/stats/summary")
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		c.s.t.Fatalf("%v: %s", err, out)
	}
	var lines []string
	for _, p := range all.Pods {
		if p.PodRef.Namespace == namespace {
			lines = append(lines, fmt.Sprintf("%s %.0f MB (anonymous %.0f MB), %.0f mcores", p.PodRef.Name, p.Memory.WorkingSetBytes/1e6, p.Memory.RSSBytes/1e6, p.CPU.UsageNanoCores/1e6))
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "; ")
}

// evict asks what kubectl drain asks.
func (c *cluster) evict(pod string) error {
	file := filepath.Join(c.s.t.TempDir(), "eviction.json")
	text := fmt.Sprintf(`{"apiVersion":"policy/v1","kind":"Eviction","metadata":{"name":%q,"namespace":%q}}`, pod, system)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return err
	}
	_, err := c.Kubectl(c.s.ctx, "create", "--raw", "/api/v1/namespaces/"+system+"/pods/"+pod+"/eviction", "-f", file)
	return err
}

// etcdServer is one outside of the clusters, which asks for certificates.
type etcdServer struct{ url, ca, cert, key string }

// etcd starts one on a host.
func (s *scene) etcd(h *lab.Host) *etcdServer {
	s.t.Helper()
	e := &etcdServer{url: "https://" + h.IP + ":2379"}
	e.issue(s.t, h.IP)
	dir := filepath.Join(os.Getenv(stateDir), "etcd")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		s.t.Fatal(err)
	}
	for name, text := range map[string]string{"ca.crt": e.ca, "tls.crt": e.cert, "tls.key": e.key} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			s.t.Fatal(err)
		}
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		s.t.Fatal(err)
	}
	cmd := h.Command(s.ctx, filepath.Join(bin, "tools", "etcd"), "--data-dir="+filepath.Join(dir, "data"), "--listen-client-urls="+e.url, "--advertise-client-urls="+e.url, "--client-cert-auth", "--unsafe-no-fsync",
		"--trusted-ca-file="+filepath.Join(dir, "ca.crt"), "--cert-file="+filepath.Join(dir, "tls.crt"), "--key-file="+filepath.Join(dir, "tls.key"))
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	return e
}

// issue makes a CA, and one certificate of it for both sides.
func (e *etcdServer) issue(t *testing.T, ip string) {
	t.Helper()
	template := func(serial int64, name string) *x509.Certificate {
		return &x509.Certificate{SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour)}
	}
	ca, leaf := template(1, "etcd-ca"), template(2, "hansed")
	ca.IsCA, ca.BasicConstraintsValid, ca.KeyUsage = true, true, x509.KeyUsageCertSign
	leaf.IPAddresses, leaf.ExtKeyUsage = []net.IP{net.ParseIP(ip)}, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	caKey, err1 := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	key, err2 := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	caDER, err3 := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	leafDER, err4 := x509.CreateCertificate(rand.Reader, leaf, ca, &key.PublicKey, caKey)
	keyDER, err5 := x509.MarshalPKCS8PrivateKey(key)
	if err := errors.Join(err1, err2, err3, err4, err5); err != nil {
		t.Fatal(err)
	}
	block := func(kind string, der []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	e.ca, e.cert, e.key = block("CERTIFICATE", caDER), block("CERTIFICATE", leafDER), block("PRIVATE KEY", keyDER)
}

// secret is what the chart's etcd.tlsSecret names.
func (e *etcdServer) secret() string {
	b64 := func(text string) string { return base64.StdEncoding.EncodeToString([]byte(text)) }
	return fmt.Sprintf("apiVersion: v1\nkind: Secret\nmetadata: {name: etcd, namespace: %s}\ntype: kubernetes.io/tls\ndata: {ca.crt: %s, tls.crt: %s, tls.key: %s}\n", system, b64(e.ca), b64(e.cert), b64(e.key))
}
