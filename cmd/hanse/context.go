package main

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"sigs.k8s.io/yaml"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/cmd/internal/chart"
	"github.com/hanse-mesh/hanse/cmd/internal/install"
	"github.com/hanse-mesh/hanse/identity"
)

const defaultSocket = "/run/hanse/hansed.sock"

// Config is the file of contexts: $HANSE_CONFIG, or hanse/config.yaml in the user's configuration directory.
type Config struct {
	Current  string    `json:"current,omitempty"`
	Contexts []Context `json:"contexts"`
}

// Context is one way to reach a hansed. Paths are relative to the file.
type Context struct {
	Name    string `json:"name"`
	Socket  string `json:"socket,omitempty"`
	Address string `json:"address,omitempty"` // host:port of remote administration; needs the three below
	SVID    string `json:"svid,omitempty"`    // PEM file: an X509-SVID spiffe://<td>/hanse/admin/<name>
	Key     string `json:"key,omitempty"`     // PEM file
	Bundle  string `json:"bundle,omitempty"`  // PEM or SPIFFE JSON file: the cluster's trust bundle

	KubeContext string `json:"kubeContext,omitempty"` // of a kubeconfig: hansed is reached through the API server
	Namespace   string `json:"namespace,omitempty"`   // in which hansed is then; default hanse-system
}

// configPath is where the contexts are, and whether someone said so.
func (c *cli) configPath() (path string, said bool) {
	if p := c.getenv("HANSE_CONFIG"); p != "" {
		return p, true
	}
	dir := c.getenv("XDG_CONFIG_HOME")
	if dir == "" {
		home := c.getenv("HOME")
		if home == "" {
			return "", false
		}
		dir = filepath.Join(home, ".config")
	}
	return filepath.Join(dir, "hanse", "config.yaml"), false
}

// config reads the contexts. A file that nobody named may be missing.
func (c *cli) config() (Config, string, error) {
	path, said := c.configPath()
	if path == "" {
		return Config{}, "", nil
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) && !said {
		return Config{}, path, nil
	}
	if err != nil {
		return Config{}, path, &admin.Error{Message: fmt.Sprintf("read the contexts: %v", err), Hint: "is $HANSE_CONFIG right?"}
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 1<<20))
	if err != nil {
		return Config{}, path, fmt.Errorf("read %s: %w", path, err)
	}
	var cfg Config
	if err := yaml.UnmarshalStrict(b, &cfg); err != nil {
		return Config{}, path, &admin.Error{Message: fmt.Sprintf("%s: %v", path, err), Hint: "it has `current: NAME` and `contexts:`, a list of {name, socket}, {name, kubeContext} or {name, address, svid, key, bundle}"}
	}
	for i := range cfg.Contexts {
		x := &cfg.Contexts[i]
		for _, p := range []*string{&x.Socket, &x.SVID, &x.Key, &x.Bundle} {
			if *p != "" && !filepath.IsAbs(*p) {
				*p = filepath.Join(filepath.Dir(path), *p)
			}
		}
	}
	return cfg, path, nil
}

// chosen is the context to use: --socket, --context, $HANSE_CONTEXT, $HANSE_SOCKET, the file's current one, the default socket.
func (c *cli) chosen() (Context, error) {
	if c.socket != "" {
		return Context{Socket: c.socket}, nil
	}
	return c.named(cmp.Or(c.context, c.getenv("HANSE_CONTEXT")))
}

// named is a context by its name: one of the configuration file, or else of a kubeconfig.
func (c *cli) named(name string) (Context, error) {
	if s := c.getenv("HANSE_SOCKET"); name == "" && s != "" {
		return Context{Socket: s}, nil
	}
	cfg, path, err := c.config()
	if err != nil {
		return Context{}, err
	}
	if name = cmp.Or(name, cfg.Current); name == "" {
		return Context{Socket: defaultSocket}, nil
	}
	var names []string
	for _, x := range cfg.Contexts {
		if x.Name == name {
			return x, nil
		}
		names = append(names, x.Name)
	}
	inKube, _, err := install.Contexts(c.kubeconfigs())
	if err != nil {
		return Context{}, usage("is --kubeconfig or $KUBECONFIG right?", "there is no context %q in %s, and %w", name, path, err)
	}
	if slices.Contains(inKube, name) {
		return Context{Name: name, KubeContext: name}, nil
	}
	names = append(names, inKube...)
	if len(names) == 0 {
		return Context{}, usage("write it into "+path+", or use --socket", "there is no context %q, for there are none", name)
	}
	return Context{}, usage("there are "+strings.Join(names, ", "), "there is no context %q in %s or a kubeconfig", name, path)
}

// client returns a client of the chosen context.
func (c *cli) client() (*admin.Client, error) {
	x, err := c.chosen()
	if err != nil {
		return nil, err
	}
	return c.clientOf(x)
}

func (c *cli) kubeconfigs() []string { return install.Kubeconfigs(c.kubeconfig, c.getenv) }

// clientOf returns a client of a context.
func (c *cli) clientOf(x Context) (*admin.Client, error) {
	if x.KubeContext != "" {
		k, err := install.Connect(c.kubeconfigs(), x.KubeContext, cmp.Or(x.Namespace, chart.Namespace))
		if err != nil {
			return nil, usage("kubectl config get-contexts", "%w", err)
		}
		return admin.New(admin.Config{Where: "hansed of context " + x.KubeContext, Dial: k.Dial})
	}
	if x.Address == "" {
		return admin.New(admin.Config{Socket: cmp.Or(x.Socket, defaultSocket)})
	}
	t, err := x.tls()
	if err != nil {
		return nil, &admin.Error{Message: fmt.Sprintf("context %s: %v", x.Name, err), Hint: "its svid, key and bundle are files of an admin SVID: see docs/operations.md"}
	}
	return admin.New(admin.Config{Address: x.Address, TLS: t})
}

// tls is mutual TLS with the context's SVID, to the control plane of its trust domain and to nobody else.
func (x Context) tls() (*tls.Config, error) {
	svid, err := x509svid.Load(x.SVID, x.Key)
	if err != nil {
		return nil, err
	}
	td := svid.ID.TrustDomain()
	if !identity.IsAdminID(td, svid.ID) {
		return nil, fmt.Errorf("%s holds %s, which is not an administrator's ID (spiffe://%s/hanse/admin/NAME)", x.SVID, svid.ID, td)
	}
	bundle, err := loadBundle(td, x.Bundle)
	if err != nil {
		return nil, err
	}
	src := identity.NewSource()
	src.Set(svid, map[spiffeid.TrustDomain]*spiffebundle.Bundle{td: bundle})
	return identity.ClientTLS(src, identity.AuthorizeID(identity.ControlPlaneID(td))), nil
}

// loadBundle reads a bundle in SPIFFE's JSON or in PEM.
func loadBundle(td spiffeid.TrustDomain, path string) (*spiffebundle.Bundle, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return parseBundle(td, b)
}

func parseBundle(td spiffeid.TrustDomain, b []byte) (*spiffebundle.Bundle, error) {
	if bytes.HasPrefix(bytes.TrimSpace(b), []byte("{")) {
		return spiffebundle.Parse(td, b)
	}
	return bundleFromPEM(td, b)
}

func (c *cli) completeContexts(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	cfg, _, err := c.config()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, x := range cfg.Contexts {
		names = append(names, x.Name)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

func (c *cli) contextsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "contexts",
		Short: "List the clusters that this command can reach",
		Long: `List the contexts of $HANSE_CONFIG (or ~/.config/hanse/config.yaml). It looks like this:

  current: west
  contexts:
  - name: west
    socket: /run/hanse/hansed.sock
  - name: north
    kubeContext: kind-north     # of a kubeconfig: hansed runs in that Kubernetes cluster, in the namespace hanse-system
  - name: east
    address: hansed.east.example:7447
    svid: east-admin.pem      # spiffe://east.example/hanse/admin/NAME
    key: east-admin.key
    bundle: east-bundle.pem

The contexts of kubeconfigs can be used by their names without being written there.

What is used is the first of --socket, --context, $HANSE_CONTEXT, $HANSE_SOCKET, current, and ` + defaultSocket + `.`,
		Example: "  hanse contexts\n  hanse --context east status",
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, path, err := c.config()
			if err != nil {
				return err
			}
			if c.output != "" {
				return c.print(cfg)
			}
			now, err := c.chosen()
			if err != nil {
				return err
			}
			if len(cfg.Contexts) == 0 {
				fmt.Fprintf(c.out, "No contexts in %s; this command uses %s\n", path, cmp.Or(now.Socket, now.Address))
				return nil
			}
			t := newTable("CONTEXT", "HANSED")
			for _, x := range cfg.Contexts {
				mark := ""
				if x == now {
					mark = "*"
				}
				t.row(plain(x.Name+mark), plain(cmp.Or(x.Socket, x.Address, "kubernetes "+x.KubeContext)))
			}
			c.table(t)
			return nil
		},
	}
	c.outputFlag(cmd, "json", "yaml")
	return cmd
}
