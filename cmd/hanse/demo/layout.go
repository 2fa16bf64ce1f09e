package demo

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"text/template"

	"github.com/hanse-mesh/hanse/deploy"
)

// cluster is one of the three, and what the templates of package deploy are filled in with.
type cluster struct {
	Name, TrustDomain, Region string
	Dir                       string // absolute

	Federation, Identity, XDS, BundleEndpoint, Admin string // host:port of hansed's listeners
	Gateway, GatewayAdmin                            string
	GatewayIP                                        string
	Workloads                                        []*workload
	Services                                         []service
}

// service is what a cluster exports.
type service struct {
	Name      string
	Workloads []*workload
}

// workload is one sidecar and, if it Serves, the application behind it.
type workload struct {
	Cluster             *cluster
	Name, Service, Zone string // payments-a, payments, eu-1a
	Serves              bool
	GatewaysOnly        bool // shows that calls come through the gateway

	IP              string
	Port, HopPort   int
	Outbound, Admin string
	App             string // the application's Unix socket
}

// layout is where everything is.
type layout struct {
	dir      string // absolute
	clusters []*cluster
	ownIPs   bool // each process has its own address
}

// maxSocketDir leaves room for the longest name below it in a Unix socket's path of 104 bytes.
const maxSocketDir = 70

// newLayout plans the demo in dir. With ownIPs each process has an address of 127.0.0.0/8 and the standard ports; else all are on
// 127.0.0.1 and have ports of their own.
func newLayout(dir string, ownIPs bool) (*layout, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if len(dir) > maxSocketDir {
		return nil, fmt.Errorf("the path %s is too long for Unix sockets below it (%d bytes at most): choose another with --dir", dir, maxSocketDir)
	}
	l := &layout{dir: dir, ownIPs: ownIPs}
	for i, c := range []struct{ name, region string }{{"west", "eu-1"}, {"east", "eu-1"}, {"north", "us-1"}} {
		n := i + 1
		ip := func(host int) string {
			if ownIPs {
				return fmt.Sprintf("127.0.%d.%d", n, host)
			}
			return "127.0.0.1"
		}
		port := func(host, standard, shared int) int {
			if ownIPs {
				return standard
			}
			return 21000 + n*1000 + shared + host
		}
		at := func(host, standard, shared int) string {
			return net.JoinHostPort(ip(host), fmt.Sprint(port(host, standard, shared)))
		}
		k := &cluster{Name: c.name, TrustDomain: c.name + ".demo", Region: c.region, Dir: filepath.Join(dir, c.name),
			Federation: at(1, 7443, 0), Identity: at(1, 7444, 100), XDS: at(1, 7445, 200), BundleEndpoint: at(1, 7446, 300), Admin: at(1, 7440, 400),
			Gateway: at(9, 15443, 500), GatewayAdmin: at(9, 15020, 600), GatewayIP: ip(9)}
		host := 11
		add := func(name, service, zone string, serves bool) {
			w := &workload{Cluster: k, Name: name, Service: service, Zone: zone, Serves: serves, GatewaysOnly: serves && ownIPs && n > 1,
				IP: ip(host), Port: port(host, 8080, 700), HopPort: port(host, 15008, 800), Outbound: at(host, 15001, 900), Admin: at(host, 15020, 600)}
			w.App = filepath.Join(k.Dir, name+".sock")
			k.Workloads = append(k.Workloads, w)
			host++
		}
		switch c.name {
		case "west":
			add("frontend", "frontend", "eu-1a", false)
			add("intruder", "intruder", "eu-1a", false)
			add("payments-a", "payments", "eu-1a", true)
			add("payments-b", "payments", "eu-1b", true)
		case "east":
			add("payments-a", "payments", "eu-1a", true)
			add("payments-b", "payments", "eu-1b", true)
			add("catalog", "catalog", "eu-1b", true)
		case "north":
			add("payments-a", "payments", "us-1a", true)
		}
		for _, w := range k.Workloads {
			if !w.Serves {
				continue
			}
			if last := len(k.Services) - 1; last >= 0 && k.Services[last].Name == w.Service {
				k.Services[last].Workloads = append(k.Services[last].Workloads, w)
			} else {
				k.Services = append(k.Services, service{w.Service, []*workload{w}})
			}
		}
		l.clusters = append(l.clusters, k)
	}
	return l, nil
}

func (l *layout) cluster(name string) *cluster {
	for _, c := range l.clusters {
		if c.Name == name {
			return c
		}
	}
	panic("no cluster " + name)
}

func (c *cluster) workload(name string) *workload {
	for _, w := range c.Workloads {
		if w.Name == name {
			return w
		}
	}
	panic("no workload " + name)
}

func (c *cluster) socket() string { return filepath.Join(c.Dir, "hansed.sock") }

// contexts is the path of the contexts of `hanse`.
func contexts(dir string) string { return filepath.Join(dir, "config.yaml") }

// write makes the directory's files.
func (l *layout) write() error {
	t, err := template.ParseFS(deploy.Demo, "demo/*.yaml.tmpl")
	if err != nil {
		return err
	}
	write := func(path, name string, data any) error {
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			return err
		}
		if err := t.ExecuteTemplate(f, name, data); err != nil {
			f.Close()
			return fmt.Errorf("write %s: %w", path, err)
		}
		return f.Close()
	}
	hanse := "current: west\ncontexts:\n"
	for _, c := range l.clusters {
		if err := os.MkdirAll(c.Dir, 0o700); err != nil {
			return err
		}
		hanse += fmt.Sprintf("- name: %s\n  socket: %s\n", c.Name, filepath.Join(c.Name, "hansed.sock"))
		for _, name := range []string{"hansed", "gateway", "mesh"} {
			if err := write(filepath.Join(c.Dir, name+".yaml"), name+".yaml.tmpl", c); err != nil {
				return err
			}
		}
		for _, w := range c.Workloads {
			if err := write(filepath.Join(c.Dir, w.Name+".yaml"), "sidecar.yaml.tmpl", w); err != nil {
				return err
			}
		}
	}
	if err := os.MkdirAll(filepath.Join(l.dir, "log"), 0o700); err != nil {
		return err
	}
	return os.WriteFile(contexts(l.dir), []byte(hanse), 0o600)
}

// listeners are all addresses that the demo needs.
func (l *layout) listeners() []string {
	var all []string
	for _, c := range l.clusters {
		all = append(all, c.Federation, c.Identity, c.XDS, c.BundleEndpoint, c.Admin, c.Gateway, c.GatewayAdmin)
		for _, w := range c.Workloads {
			all = append(all, w.Outbound, w.Admin)
			if w.Serves {
				all = append(all, net.JoinHostPort(w.IP, fmt.Sprint(w.HopPort)))
			}
		}
	}
	return all
}

// ownIPs reports whether this machine lets anybody bind any address of 127.0.0.0/8, as Linux does.
func ownIPs() bool {
	ln, err := net.Listen("tcp", "127.0.1.1:0")
	if err != nil {
		return false
	}
	ln.Close()
	return true
}

// free says which address is taken already.
func (l *layout) free() error {
	for _, a := range l.listeners() {
		ln, err := net.Listen("tcp", a)
		if err != nil {
			return fmt.Errorf("%s cannot be used: %w", a, err)
		}
		ln.Close()
	}
	return nil
}

// Contexts is the path of the contexts of the demo in dir, for $HANSE_CONFIG.
func Contexts(dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(contexts(dir)); err != nil {
		if os.IsNotExist(err) {
			return "", ErrNone
		}
		return "", err
	}
	return contexts(dir), nil
}
