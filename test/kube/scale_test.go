package kube

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/types/known/structpb"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kruntime "k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/hanse-mesh/hanse/discovery/kube"
	"github.com/hanse-mesh/hanse/discovery/objects"
)

// The size that is measured.
const (
	scaleServices   = 10_000
	scaleEndpoints  = 100 // of each
	scaleNamespaces = 100
)

// fill stores Services with an EndpointSlice each, and a ServiceExport if they are exported, as the API server would, in its etcd and while it
// is away: a million endpoints take seconds so, and minutes by its own API.
func (s *server) fill(services, endpoints int, exported bool) {
	s.t.Helper()
	if exported {
		s.crds(filepath.Join(module(s.t, "sigs.k8s.io/mcs-api"), "config/crd"), "serviceexports", "serviceimports")
	}
	s.kill()
	client := v3client.New(s.etcd.Server)
	defer client.Close()
	scheme := kruntime.NewScheme()
	encoder := protobuf.NewSerializer(scheme, scheme)
	now := metav1.NewTime(time.Now().Add(-time.Hour))
	put := func(key string, o kruntime.Object) error {
		var b bytes.Buffer
		if err := encoder.Encode(o, &b); err != nil {
			return err
		}
		_, err := client.Put(context.Background(), "/registry/"+key, b.String())
		return err
	}
	meta := func(n int, name string) metav1.ObjectMeta {
		m := metav1.ObjectMeta{Name: name, UID: types.UID(fmt.Sprintf("00000000-0000-4000-8000-%012d", n)), CreationTimestamp: now,
			ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "kube-controller-manager", Operation: "Update", APIVersion: "v1", Time: &now, FieldsType: "FieldsV1",
				FieldsV1: metav1.NewFieldsV1(`{"f:metadata":{"f:labels":{".":{},"f:app":{}}},"f:spec":{"f:internalTrafficPolicy":{},"f:ports":{},"f:selector":{},"f:sessionAffinity":{},"f:type":{}}}`)}}}
		return m
	}
	next := make(chan int)
	errs := make(chan error, 1)
	var running sync.WaitGroup
	for range 16 {
		running.Go(func() {
			for n := range next {
				ns, name := scaleNamespace(n), fmt.Sprintf("svc-%05d", n)
				policy, single := corev1.ServiceInternalTrafficPolicyCluster, corev1.IPFamilyPolicySingleStack
				svc := &corev1.Service{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Service"}, ObjectMeta: meta(n, name), Spec: corev1.ServiceSpec{
					Type: corev1.ServiceTypeClusterIP, ClusterIP: "None", ClusterIPs: []string{"None"}, InternalTrafficPolicy: &policy, IPFamilyPolicy: &single,
					IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol}, SessionAffinity: corev1.ServiceAffinityNone, Selector: map[string]string{"app": name},
					Ports: []corev1.ServicePort{{Name: "http", Port: 80, Protocol: corev1.ProtocolTCP}}}}
				svc.Namespace, svc.Labels = ns, map[string]string{"app": name}
				yes, no, port, proto, portName := true, false, int32(8080), corev1.ProtocolTCP, "http"
				slice := &discoveryv1.EndpointSlice{TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice"}, ObjectMeta: meta(services+n, name+"-x7k2p"),
					AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: &portName, Port: &port, Protocol: &proto}}}
				slice.Namespace, slice.GenerateName = ns, name+"-"
				slice.Labels = map[string]string{"kubernetes.io/service-name": name, "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io", "app": name}
				slice.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Service", Name: name, UID: svc.UID, Controller: &yes, BlockOwnerDeletion: &yes}}
				slice.Annotations = map[string]string{"endpoints.kubernetes.io/last-change-trigger-time": "2026-01-02T03:04:05Z"}
				if exported { // as somebody writes them for workloads with sidecars that are no Pods: only such endpoints can be exported
					delete(slice.Labels, "endpointslice.kubernetes.io/managed-by")
				}
				for e := range endpoints {
					i := n*endpoints + e
					node, zone := fmt.Sprintf("node-%04d", i%1000), fmt.Sprintf("eu-1%c", 'a'+i%3)
					slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{
						Addresses:  []string{fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&255, i&255)},
						Conditions: discoveryv1.EndpointConditions{Ready: &yes, Serving: &yes, Terminating: &no}, NodeName: &node, Zone: &zone,
						TargetRef: &corev1.ObjectReference{Kind: "Pod", Namespace: ns, Name: fmt.Sprintf("%s-7d9c6b5f4-%05d", name, e), UID: types.UID(fmt.Sprintf("00000001-0000-4000-8000-%012d", i))},
					})
					if exported {
						slice.Endpoints[e].TargetRef = nil
					}
				}
				err := errors.Join(put("services/specs/"+ns+"/"+name, svc), put("endpointslices/"+ns+"/"+slice.Name, slice))
				if exported && err == nil {
					_, err = client.Put(context.Background(), "/registry/multicluster.x-k8s.io/serviceexports/"+ns+"/"+name, fmt.Sprintf(
						`{"apiVersion":"multicluster.x-k8s.io/v1beta1","kind":"ServiceExport","metadata":{"name":%q,"namespace":%q,"uid":"00000002-0000-4000-8000-%012d","creationTimestamp":%q,"generation":1}}`,
						name, ns, n, now.UTC().Format(time.RFC3339)))
				}
				if err != nil {
					select {
					case errs <- err:
					default:
					}
				}
			}
		})
	}
	for n := range services {
		next <- n
	}
	close(next)
	running.Wait()
	for n := range scaleNamespaces {
		ns := &corev1.Namespace{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"}, ObjectMeta: meta(2*services+n, scaleNamespace(n)), Status: corev1.NamespaceStatus{Phase: corev1.NamespaceActive}}
		if err := put("namespaces/"+ns.Name, ns); err != nil {
			s.t.Fatal(err)
		}
	}
	select {
	case err := <-errs:
		s.t.Fatal(err)
	default:
	}
	s.run()
}

func scaleNamespace(n int) string { return fmt.Sprintf("scale-%02d", n%scaleNamespaces) }

// scaleEnv carries the API server's address to a process that only reads it.
const scaleEnv = "HANSE_TEST_KUBE_SOURCE"

// readOnly is the process whose memory is measured: a Source and Build, as hansed has them.
func readOnly() {
	host, ca, _ := strings.Cut(os.Getenv(scaleEnv), " ")
	config := rest.Config{Host: host, BearerToken: "admintoken", TLSClientConfig: rest.TLSClientConfig{CAFile: ca}}
	debug.SetGCPercent(50) // as hansed does
	began := time.Now()
	src, err := kube.New(kube.Config{REST: &config})
	if err != nil {
		panic(err)
	}
	go func() { _ = src.Run(context.Background()) }()
	for !src.Complete() {
		<-src.Updated()
	}
	var r sourceReport
	r.Read = time.Since(began).Seconds()
	snap, _, _ := objects.Build(objects.Input{Self: self, Set: src.Set(), Now: time.Now(), Complete: true})
	r.Built = time.Since(began).Seconds()
	for _, s := range snap.Services.All() {
		r.Endpoints += len(s.Endpoints)
	}
	r.Peak, _ = memory("self")
	runtime.GC()
	debug.FreeOSMemory()
	_, r.Settled = memory("self")
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	r.Heap = int(m.HeapAlloc >> 20)
	_ = json.NewEncoder(os.Stdout).Encode(r)
	runtime.KeepAlive(snap)
	runtime.KeepAlive(src)
}

// sourceReport is what readOnly says: seconds and MB.
type sourceReport struct {
	Endpoints           int
	Read, Built         float64
	Peak, Settled, Heap int
}

// memory returns the highest and the present resident size of a process in MB.
func memory(pid string) (peak, rss int) {
	b, _ := os.ReadFile("/proc/" + pid + "/status")
	for line := range strings.SplitSeq(string(b), "\n") {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		kb, _ := strconv.Atoi(f[1])
		switch f[0] {
		case "VmHWM:":
			peak = kb >> 10
		case "VmRSS:":
			rss = kb >> 10
		}
	}
	return peak, rss
}

// BenchmarkSource measures a process that only reads: how long until the first Snapshot of a million endpoints, and how much memory.
func BenchmarkSource(b *testing.B) {
	s := start(b)
	s.fill(scaleServices, scaleEndpoints, false)
	for b.Loop() {
		cmd := exec.Command(os.Args[0], "-test.run=^$")
		cmd.Env = append(os.Environ(), scaleEnv+"="+s.config.Host+" "+s.config.CAFile)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		if err != nil {
			b.Fatal(err)
		}
		var r sourceReport
		if err := json.Unmarshal(out, &r); err != nil || r.Endpoints < scaleServices*scaleEndpoints {
			b.Fatalf("%s: %v", out, err)
		}
		b.ReportMetric(r.Read, "s-to-read")
		b.ReportMetric(r.Built, "s-to-Snapshot")
		b.ReportMetric(float64(r.Peak), "MB-peak")
		b.ReportMetric(float64(r.Settled), "MB-settled")
		b.ReportMetric(float64(r.Heap), "MB-heap")
	}
}

const probe = `
apiVersion: v1
kind: Namespace
metadata: {name: probe}
---
apiVersion: v1
kind: Service
metadata: {name: probe, namespace: probe}
spec: {clusterIP: None, ports: [{name: http, port: 80}]}
`

// probeSlice has 100 endpoints with sidecars, of which the last is ready or not.
func probeSlice(ready bool) []byte {
	b := []byte(`{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","metadata":{"name":"probe","namespace":"probe","labels":{"kubernetes.io/service-name":"probe"}},"addressType":"IPv4","ports":[{"name":"http","port":8080}],"endpoints":[`)
	for i := range scaleEndpoints {
		if i > 0 {
			b = append(b, ',')
		}
		b = fmt.Appendf(b, `{"addresses":["10.250.0.%d"],"conditions":{"ready":%v}}`, i+1, i < scaleEndpoints-1 || ready)
	}
	return append(b, "]}"...)
}

// BenchmarkHansed measures the whole program beside a million endpoints: how long until it shows them, how much memory, how long after a change
// of one endpoint is written a subscriber of xDS has it, and what it costs that the API server is killed and starts again.
func BenchmarkHansed(b *testing.B) { benchmarkHansed(b, false) }

// BenchmarkExported is the same with every Service exported, and so written to hansed's own etcd, slot by slot, and a ServiceImport for each.
func BenchmarkExported(b *testing.B) { benchmarkHansed(b, true) }

func benchmarkHansed(b *testing.B, exported bool) {
	s := start(b)
	s.fill(scaleServices, scaleEndpoints, exported)
	s.apply([]byte(probe))
	s.apply(probeSlice(true))
	for b.Loop() {
		h := newHansed(b, s)
		began := time.Now()
		until(b, "hansed shows the probe", func() bool {
			return strings.Contains(h.hanse("get", "services", "probe", "-n", "probe", "-o", "json"), `"probe"`)
		})
		b.ReportMetric(time.Since(began).Seconds(), "s-to-show")
		pid := strconv.Itoa(h.cmd.Process.Pid)
		b.ReportMetric(float64(ticks(pid))/100, "s-CPU-to-show")
		if exported {
			until(b, "all is exported", func() bool {
				return strings.Contains(h.hanse("status", "-o", "json"), fmt.Sprintf(`"exports": %d`, scaleServices))
			})
			b.ReportMetric(time.Since(began).Seconds(), "s-to-export")
			b.ReportMetric(float64(ticks(pid))/100, "s-CPU-to-export")
		}
		stream := h.subscribe(b, "probe.probe.svc.clusterset.local:80")
		b.Log(h.healthy(b, stream), "endpoints are healthy at first")
		h.settle(b)
		h.profile("profile?seconds=20", "cpu")
		cpu := ticks(pid)
		var took, wrote []time.Duration
		for i := range scaleChanges {
			time.Sleep(time.Duration(i%7) * 20 * time.Millisecond)
			pushed, written := h.change(b, s, stream, i%2 == 1)
			took, wrote = append(took, pushed), append(wrote, written)
		}
		b.ReportMetric(float64(ticks(pid)-cpu)*10/scaleChanges, "ms-CPU/change")
		slices.Sort(took)
		slices.Sort(wrote)
		b.ReportMetric(float64(wrote[len(wrote)/2].Microseconds())/1000, "ms-write-p50")
		b.ReportMetric(float64(wrote[len(wrote)*99/100].Microseconds())/1000, "ms-write-p99")
		b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "ms-push-p50")
		b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "ms-push-p99")
		h.profile("heap?gc=1", "heap").Wait()
		peak, rss := memory(pid)
		b.ReportMetric(float64(peak), "MB-peak")
		b.ReportMetric(float64(rss), "MB-settled")

		// The API server goes away and comes back: watches go on; or etcd has forgotten meanwhile what came after them, and all is listed again.
		for _, what := range []string{"restart", "relist"} {
			forgotten := what == "relist"
			if err := os.WriteFile("/proc/"+pid+"/clear_refs", []byte("5"), 0); err != nil { // the peak is counted anew
				b.Fatal(err)
			}
			_, before := memory(pid)
			cpu = ticks(pid)
			s.kill()
			if forgotten {
				s.forget()
			}
			s.run()
			began := time.Now()
			pushed, _ := h.change(b, s, stream, forgotten)
			b.ReportMetric(pushed.Seconds(), "s-push-after-"+what)
			listed := h.settle(b)
			peak, rss := memory(pid)
			b.ReportMetric(listed.Sub(began).Seconds(), "s-busy-"+what)
			b.ReportMetric(float64(ticks(pid)-cpu)/100, "s-CPU-"+what)
			b.ReportMetric(float64(peak), "MB-peak-"+what)
			b.Logf("%s: %d MB before, %d MB at most, %d MB after; %d lists of EndpointSlices", what, before, peak, rss, s.lists("endpointslices"))
		}
	}
}

// forget makes etcd forget all revisions but the last, of which nobody knows.
func (s *server) forget() {
	s.t.Helper()
	client := v3client.New(s.etcd.Server)
	defer client.Close()
	var last int64
	for range 2 {
		put, err := client.Put(context.Background(), "unrelated", "")
		if err != nil {
			s.t.Fatal(err)
		}
		last = put.Header.Revision
	}
	if _, err := client.Compact(context.Background(), last); err != nil {
		s.t.Fatal(err)
	}
}

// lists counts the lists of a resource that the API server has answered since it started, as streams or not.
func (s *server) lists(resource string) int {
	s.t.Helper()
	client := http.Client{Transport: &http.Transport{TLSClientConfig: insecure(), DisableKeepAlives: true}, Timeout: time.Minute}
	req, err := http.NewRequest("GET", "https://"+s.addr+"/metrics", nil)
	if err != nil {
		s.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer admintoken")
	resp, err := client.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	all, n := bufio.NewScanner(io.LimitReader(resp.Body, 64<<20)), 0
	all.Buffer(nil, 1<<20)
	for all.Scan() {
		series, value, _ := strings.Cut(all.Text(), "} ")
		if strings.Contains(series, `resource="`+resource+`"`) && (strings.HasPrefix(series, "apiserver_request_total{") && strings.Contains(series, `verb="LIST"`) || strings.HasPrefix(series, "apiserver_watch_list_duration_seconds_count{")) {
			v, _ := strconv.ParseFloat(value, 64)
			n += int(v)
		}
	}
	return n
}

// change writes the probe's last endpoint as ready or not, and returns after how long a subscriber has it, and how long the API server took.
func (h *hansed) change(t testing.TB, s *server, stream discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient, ready bool) (pushed, written time.Duration) {
	t.Helper()
	o := decode(t, probeSlice(ready))[0]
	r, err := s.resource(o)
	if err != nil {
		t.Fatal(err)
	}
	want := scaleEndpoints - 1
	if ready {
		want++
	}
	began := time.Now()
	if _, err := r.Apply(t.Context(), o.GetName(), o, metav1.ApplyOptions{FieldManager: "test", Force: true}); err != nil {
		t.Fatal(err)
	}
	written = time.Since(began)
	for h.healthy(t, stream) != want {
	}
	return time.Since(began), written
}

// settle waits until hansed does next to nothing, but no longer than a minute: ServiceImports and statuses of 10,000 exports are written for
// longer than that. It returns since when.
func (h *hansed) settle(t testing.TB) (since time.Time) {
	t.Helper()
	pid := strconv.Itoa(h.cmd.Process.Pid)
	since = time.Now()
	for quiet, deadline := 0, time.Now().Add(time.Minute); quiet < 3 && time.Now().Before(deadline); {
		before := ticks(pid)
		time.Sleep(time.Second)
		if quiet++; ticks(pid)-before > 5 {
			quiet, since = 0, time.Now()
		}
	}
	return since
}

// profile writes one of hansed's profiles into the directory that HANSE_TEST_PROFILE names, if it does.
func (h *hansed) profile(what, file string) *sync.WaitGroup {
	var running sync.WaitGroup
	dir := os.Getenv("HANSE_TEST_PROFILE")
	if dir == "" {
		return &running
	}
	running.Go(func() {
		resp, err := http.Get("http://" + h.admin + "/debug/pprof/" + what)
		if err != nil {
			h.t.Error(err)
			return
		}
		defer resp.Body.Close()
		f, err := os.Create(filepath.Join(dir, file))
		if err == nil {
			_, err = io.Copy(f, resp.Body)
			f.Close()
		}
		if err != nil {
			h.t.Error(err)
		}
	})
	return &running
}

const scaleChanges = 300

// subscribe asks for the endpoints of an authority, as a workload of the mesh.
func (h *hansed) subscribe(t testing.TB, authority string) discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient {
	t.Helper()
	h.write("bench.token", h.hanse("token", "create", "--agent", "probe/bench"))
	h.write("bundle.json", h.hanse("trust", "show", "west.demo", "-o", "bundle"))
	config := h.write("agent.yaml", fmt.Sprintf(`role: agent
cluster: west
trustDomain: west.demo
region: eu-1
namespace: probe
controlPlane: {identity: [%q], xds: [%q], trustBundle: bundle.json, tokenFile: bench.token}
stateDir: agent
socket: agent.sock
admin: {listen: %q}
`, h.identity, h.xds, freePorts(t, 1)[0]))
	h.start("hanse-proxy", filepath.Join(h.dir, "agent.log"), "--config", config)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	socket := filepath.Join(h.dir, "agent.sock")
	until(t, "the agent serves", func() bool { _, err := os.Stat(socket); return err == nil })
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+socket)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { source.Close() })
	conn, err := grpc.NewClient(h.xds, grpc.WithTransportCredentials(credentials.NewTLS(tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeMemberOf(spiffeid.RequireTrustDomainFromString("west.demo"))))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	metadata, err := structpb.NewStruct(map[string]any{"cluster": "west", "network": "west", "namespace": "probe", "role": "agent"})
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: claType, ResourceNamesSubscribe: []string{authority},
		Node: &corev3.Node{Id: "bench", UserAgentName: "hanse-proxy", Metadata: metadata, Locality: &corev3.Locality{Region: "eu-1"}}}); err != nil {
		t.Fatal(err)
	}
	return stream
}

const claType = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"

// healthy waits for the next answer, and counts its healthy endpoints.
func (h *hansed) healthy(t testing.TB, stream discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient) int {
	t.Helper()
	r, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce}); err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, res := range r.Resources {
		var cla endpointv3.ClusterLoadAssignment
		if err := res.Resource.UnmarshalTo(&cla); err != nil {
			t.Fatal(err)
		}
		for _, l := range cla.Endpoints {
			for _, e := range l.LbEndpoints {
				if e.HealthStatus == corev3.HealthStatus_HEALTHY {
					n++
				}
			}
		}
	}
	return n
}

// ticks is the CPU time of a process, in hundredths of a second.
func ticks(pid string) int {
	b, _ := os.ReadFile("/proc/" + pid + "/stat")
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	user, _ := strconv.Atoi(f[11])
	system, _ := strconv.Atoi(f[12])
	return user + system
}
